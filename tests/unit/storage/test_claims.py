"""Facts about names and files that one process takes: nobody gets a second process's."""

import os
import threading

import pytest

from tdpo_cli.errors import RequestError
from tdpo_cli.storage import claims, disk


def test_new_folders_are_made_and_counted_up_past_what_exists(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-0001").write_text("a file")
    with claims.new_folder(tmp_path / "runs", "a") as first, claims.new_folder(tmp_path / "runs", "a") as second:
        assert (first.name, second.name) == ("a-0002", "a-0003") and first.is_dir() and second.is_dir()


def test_a_new_folder_that_an_error_leaves_empty_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), claims.new_folder(tmp_path / "samples", "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), claims.new_folder(tmp_path / "samples", "a") as folder:
        (folder / "image.png").touch()
        raise ZeroDivisionError
    assert (tmp_path / "samples/a-0001/image.png").exists()


def test_many_at_once_get_different_names(tmp_path):
    got, start = [], threading.Barrier(8)

    def take():
        start.wait()
        for _ in range(5):
            path, file = claims.new_file(tmp_path, "s", ".jsonl", "writing")
            got.append(path)
            file.close()

    threads = [threading.Thread(target=take) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(got)) == 40


def test_a_file_has_one_owner_and_keeps_its_content(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("rows\n")
    with claims.own_file(path, "writing"):
        with pytest.raises(RequestError, match="another tdpo process is writing this file"):
            claims.own_file(path, "writing")
    with claims.own_file(path, "writing"):
        assert path.read_text() == "rows\n"


def test_a_file_that_its_owner_removes_is_not_taken_over_without_a_name(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "s.jsonl", disk._flock, []

    def removed_in_between(file, place, busy):
        if not calls:
            path.unlink()  # by the owner that was refused, between the two calls
        calls.append(1)
        real(file, place, busy)

    monkeypatch.setattr(disk, "_flock", removed_in_between)
    with claims.own_file(path, "writing") as file:
        assert len(calls) == 2 and os.path.samestat(os.fstat(file.fileno()), path.stat())


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(RequestError):
            claims.own_file(path, "writing")
