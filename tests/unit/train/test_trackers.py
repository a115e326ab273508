"""Facts about trackers: they are told what metrics.jsonl says, epoch by epoch, and are never in training's way."""

import io
import json
import struct
import sys

import numpy as np
import pytest
import tiny
from accelerate import tracking
from helpers import tdpo
from PIL import Image

from tdpo_cli.config.preset import override
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train import trackers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    tiny.preset(folder, algorithm__name="ddpo", run__epochs=2, run__preview_images=2)
    return folder


@pytest.fixture(scope="module")
def train(place):
    """Train the tiny preset into place/NAME, or with `--resume` train on. -> the run folder"""

    def run(name, *arguments):
        start = ["--resume"] if "--resume" in arguments else ["--preset", place / "tiny.toml"]
        outcome = tdpo("train", *start, "--out", place / name, *(word for word in arguments if word != "--resume"))
        assert outcome.status == 0, outcome.err
        return place / name

    return run


@pytest.fixture(scope="module")
def plain(train):
    return train("plain")


@pytest.fixture(scope="module")
def straight(train):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    return train("straight", "--tracker", "tensorboard")


def board(run, files="trackers/tensorboard"):
    """What TensorBoard shows. -> tag -> [(step, value)], and step -> preview as [H,W,3]"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / files), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = [(event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for tag in tags["images"] for event in events.Images(tag)]
    return scalars, images


def expected(run):
    """The same from metrics.jsonl, in the single precision of TensorBoard's scalars."""
    curves = {}
    for row in tiny.rows(run, timings=True):
        for name, value in row.items():
            if value is not None and not isinstance(value, list):  # trackers draw numbers
                curves.setdefault(name, []).append((row["epoch"], float(np.float32(value))))
    return curves


def assert_shows_the_run(run):
    scalars, images = board(run)
    assert scalars == expected(run)
    assert [step for step, _ in images] == [row["epoch"] for row in tiny.rows(run)]
    for step, pixels in images:
        assert (pixels == np.asarray(Image.open(run / f"images/epoch_{step:04d}.png").convert("RGB"))).all()


# --- what is sent -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_there_are_none_by_default(plain):
    assert not (plain / "trackers").exists()
    assert json.loads((plain / "preset.json").read_text())["run"]["trackers"] == []


@pytest.mark.slow
def test_tensorboard_shows_every_row_and_preview_and_nothing_else(straight):
    assert_shows_the_run(straight)
    unused = {name for name, value in tiny.rows(straight, timings=True)[0].items() if value is None}
    assert unused and not unused & board(straight)[0].keys()


@pytest.mark.slow
def test_tracking_changes_nothing_of_the_run(straight, plain):
    assert tiny.rows(straight) == tiny.rows(plain)
    weights = "checkpoints/epoch_0001/pytorch_lora_weights.safetensors"
    assert (straight / weights).read_bytes() == (plain / weights).read_bytes()


def test_a_value_that_does_not_apply_is_left_out():
    assert trackers.numbers({"epoch": 0, "mean_kl": None, "policy_loss": float("nan"), "reset": 0}) == {"epoch": 0, "reset": 0}


def test_only_the_main_process_tracks(tmp_path):
    preset = override(Preset(), [("run.trackers", ["tensorboard"])])
    with trackers.started(preset, RunDir(tmp_path), Console(quiet=True), is_main=False) as catch_up:
        catch_up()
    assert list(tmp_path.iterdir()) == []


# --- starts and ends --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_folder(straight, train):
    run = train("resumed", "--tracker", "tensorboard", "--epochs", 1)
    train("resumed", "--resume", "--epochs", 2)
    files = sorted((run / "trackers/tensorboard").glob("events*"))
    assert [[step for step, _ in board(run, file)[1]] for file in files] == [[0], [1]]  # nothing is sent twice
    assert_shows_the_run(run)
    assert tiny.rows(run) == tiny.rows(straight)


@pytest.mark.slow
def test_a_tracker_added_to_a_finished_run_is_told_all_of_it(train, straight):
    run = train("late")
    before = (run / "metrics.jsonl").read_bytes()
    train("late", "--resume", "--tracker", "tensorboard")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert_shows_the_run(run)


@pytest.mark.slow
def test_a_tracker_may_be_dropped_when_a_run_goes_on(train, straight):
    run = train("dropped", "--tracker", "tensorboard", "--epochs", 1)
    train("dropped", "--resume", "--epochs", 2, "--set", "run.trackers=[]")
    assert len(tiny.rows(run)) == 2 and [step for step, _ in board(run)[0]["epoch"]] == [0]


@pytest.mark.slow
def test_an_epoch_that_runs_again_counts_once(train, straight):
    """The newest state is damaged, so the resume goes back to the one before."""
    run = train("again", "--tracker", "tensorboard")
    (run / "state/epoch_0001/state.pt").write_bytes(b"torn")
    train("again", "--resume", "--epochs", 3)
    assert [step for step, _ in board(run)[0]["epoch"]] == [0, 1, 2]
    assert_shows_the_run(run)


@pytest.mark.slow
def test_a_run_that_was_stopped_before_the_tracker_heard_loses_no_epoch(train, place, straight, monkeypatch):
    def stopped(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trackers.TensorBoard, "log", stopped)
        outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", place / "stopped", "--tracker", "tensorboard", "--epochs", 3)
    assert outcome.status == 130 and len(tiny.rows(place / "stopped")) == 1
    run = train("stopped", "--resume")
    assert [row["epoch"] for row in tiny.rows(run)] == [0, 1, 2]
    assert_shows_the_run(run)


# --- what goes wrong --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_tracker_that_fails_warns_once_and_is_told_later_what_it_missed(train, plain, straight, monkeypatch):
    real, calls = tracking.TensorBoardTracker.log, []

    def fails_after_the_first_epoch(self, values, step=None, **kwargs):
        calls.append(step)
        if "epoch" in values and step >= 1:
            raise OSError("No space left on device")
        return real(self, values, step, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(tracking.TensorBoardTracker, "log", fails_after_the_first_epoch)
        run = train("failing", "--tracker", "tensorboard", "--epochs", 3)
    log = (run / "log.txt").read_text()
    assert log.count("tracker tensorboard failed") == 1 and "OSError: No space left on device. metrics.jsonl has every epoch" in log
    assert calls == [0, 0, 1]  # the preset, epoch 0, the failure
    assert tiny.rows(run)[:2] == tiny.rows(plain) and len(tiny.rows(run)) == 3
    train("failing", "--resume")
    assert_shows_the_run(run)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_cannot_start_is_a_warning(train, plain, monkeypatch, tracker):
    pytest.importorskip(tracker, reason=f"the extra `{tracker}` is not installed")
    cls = {"tensorboard": tracking.TensorBoardTracker, "wandb": tracking.WandBTracker}[tracker]

    def unreachable(self):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(cls, "start", unreachable)
    run = train(f"unreachable {tracker}", "--tracker", tracker)
    assert (run / "log.txt").read_text().count(f"warning: tracker {tracker} failed") == 1
    assert tiny.rows(run) == tiny.rows(plain)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_training_and_says_what_to_install(place, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", place / "missing", "--tracker", tracker)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == f"tdpo: tracker {tracker} needs a package that is not installed: pip install {tracker}, or leave the tracker out.\n"
    assert not (place / "missing").exists()


@pytest.mark.parametrize("arguments", [["--tracker", "tensorbord"], ["--set", "run.trackers=wandb,tensorbord"]], ids=" ".join)
def test_an_unknown_tracker_is_refused(arguments):
    outcome = tdpo("train", *arguments, "--dry-run")
    assert outcome.status == 2
    assert "run.trackers: unknown tracker 'tensorbord'. Did you mean tensorboard? Known: tensorboard, wandb." in outcome.err


# --- Weights & Biases, offline ----------------------------------------------------------------------------------------------
def history(file):
    """An offline run's file (LevelDB's log format). -> run ids, [(step, {name: value})], exit statuses"""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    runs, steps, exits = set(), [], []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends in padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message, record = wandb_internal_pb2.Record.FromString(record), b""
            which = message.WhichOneof("record_type")
            if which == "run":
                runs.add(message.run.run_id)
            elif which == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
                steps.append((message.history.step.num, items))
            elif which == "exit":
                exits.append(message.exit.exit_code)
    return runs, steps, exits


@pytest.mark.slow
def test_wandb_offline_gets_the_whole_run_under_one_id_at_every_start(train, plain, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train("wandb", "--tracker", "wandb", "--epochs", 1)
    train("wandb", "--resume", "--epochs", 2)
    assert tiny.rows(run) == tiny.rows(plain)
    files = sorted((run / "trackers/wandb").glob("offline-run-*/*.wandb"))
    known = [history(file) for file in files]
    assert [runs for runs, _, _ in known] == [{(run / "trackers/wandb_id.txt").read_text()}] * 2
    assert [[step for step, _ in steps] for _, steps, _ in known] == [[0], [0, 1]]
    assert [exits for _, _, exits in known] == [[0], [0]]
    for row, (_, items) in zip(tiny.rows(run, timings=True), known[-1][1], strict=True):
        sent = {name: value for name, value in items.items() if not name.startswith(("_", "preview"))}
        assert sent == {name: value for name, value in row.items() if value is not None}
    media = sorted(files[-1].parent.glob("files/media/images/preview_*.png"))
    assert [np.asarray(Image.open(file)).tolist() for file in media] == [
        np.asarray(Image.open(run / f"images/epoch_{epoch:04d}.png").convert("RGB")).tolist() for epoch in (0, 1)
    ]
