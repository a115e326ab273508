"""Facts about folders that go away while a command works with them: it stops with one message, and the same command then does all of it."""

import json
import os
import shutil

import pytest
from helpers import tdpo
from PIL import Image

from tdpo_cli.cross_eval.folder import Folder
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.rewards.simple import JpegSize
from tdpo_cli.score.score_file import ScoreFile
from tdpo_cli.storage import disk

SAMPLE = ("sample", "base", *(f"a red {shape} on a blue background" for shape in ("circle", "square", "ring")), "--steps", "1", "--batch-size", "1")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i * 20,) * 3).save(folder / f"{i:02d}.png")
    return folder


def once(monkeypatch, place, name, call, act):
    """`act` happens right before that call (0, 1, ...) of a function."""
    real, calls = getattr(place, name), []

    def wrapped(*arguments, **more):
        calls.append(1)
        if len(calls) == call + 1:
            act()
        return real(*arguments, **more)

    monkeypatch.setattr(place, name, wrapped)


# --- the folder that is written to ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_samples_are_not_written_into_half_a_folder(tmp_path, monkeypatch, again):
    out = tmp_path / "out"

    def remove():
        shutil.rmtree(out)
        if again:  # somebody else's now
            disk.lock(out, "sampling").close()

    with monkeypatch.context() as patch:
        once(patch, Image.Image, "save", 1, remove)
        outcome = tdpo(*SAMPLE, "--out", out)
    assert outcome.status == 1 and "Traceback" not in outcome.err and str(out) in outcome.err
    assert len(list(out.rglob("*.png"))) <= again and not (out / "metadata.jsonl").exists()  # the one that was being written
    assert tdpo(*SAMPLE, "--out", out).status == 0
    assert len(list(out.glob("0*.png"))) == 3


def test_samples_that_were_removed_one_by_one_are_not_listed(tmp_path, monkeypatch):
    once(monkeypatch, Image.Image, "save", 2, lambda: next(tmp_path.glob("0000-*.png")).unlink())
    outcome = tdpo(*SAMPLE, "--out", tmp_path)
    assert outcome.status == 1 and "1 images were removed meanwhile, 0000-a-red-circle" in outcome.err
    assert not (tmp_path / "metadata.jsonl").exists()


def test_rows_of_scores_are_not_appended_to_another_file(tmp_path):
    rows = [{"image": "a.png", "prompt": None, "r": 1.0}]
    with ScoreFile.taken(tmp_path / "x.jsonl", "x", ["r"]) as file:
        file.append(rows)
        (tmp_path / "x.jsonl").unlink()
        for there in (False, True):
            if there:
                (tmp_path / "x.jsonl").touch()
            with pytest.raises(WorkError, match="the file was removed, moved or replaced"):
                file.append(rows)
    assert (tmp_path / "x.jsonl").read_text() == ""


def test_a_cross_evaluation_stops_where_its_folder_is_gone(tmp_path):
    folder, other = Folder(tmp_path / "out"), Folder(tmp_path / "out")
    folder.lock()
    folder.begin({"models": []})
    other.watch()  # as a second process of the same evaluation
    for one in (folder, other):
        one.still_there()
        one.write_part("base", 0, {"scores": {}})
    shutil.rmtree(tmp_path / "out")
    for one in (folder, other):
        with pytest.raises(WorkError, match="was removed, moved or replaced"):
            one.still_there()
        with pytest.raises(WorkError):
            one.write_part("base", 0, {})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_machine_made_may_show_late(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: disk.lock(tmp_path / "late", "at work").close())
    assert disk.is_locked_by(tmp_path / "late", disk.watch(tmp_path / "late"))
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: None)
    assert disk.watch(tmp_path / "never", within=0.01) is None


def test_a_lock_is_of_the_folder_that_is_there(tmp_path, monkeypatch):
    """The folder goes between the two calls that take it: the lock would be of a file without a name."""
    once(monkeypatch, disk.fcntl, "flock", 0, lambda: shutil.rmtree(tmp_path / "out"))
    lock = disk.lock(tmp_path / "out", "at work")
    assert disk.is_locked_by(tmp_path / "out", lock)
    with pytest.raises(RequestError, match="another tdpo process is at work"):
        disk.lock(tmp_path / "out", "at work")


# --- the folder that is read ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_images_whose_folder_went_away_get_no_rows_without_scores(pictures, tmp_path, monkeypatch, left):
    out, command = tmp_path / "s.jsonl", ("score", pictures, "--rewards", "jpeg-compressibility", "--batch-size", 1)
    assert tdpo(*command, "--out", tmp_path / "whole.jsonl").status == 0

    def unmount():
        pictures.rename(tmp_path / "away")
        if left != "nothing":
            pictures.mkdir()

    with monkeypatch.context() as patch:
        once(patch, JpegSize, "score", 5, unmount)  # in the second of three chunks
        outcome = tdpo(*command, "--out", out)
    assert outcome.status == 1 and "the folder of images was removed, moved or replaced" in outcome.err
    assert all(json.loads(line)["jpeg-compressibility"] is not None for line in out.read_text().splitlines())
    shutil.rmtree(pictures, ignore_errors=True)
    os.rename(tmp_path / "away", pictures)
    assert tdpo(*command, "--out", out).status == 0
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
