"""Facts about what the disk holds: damage is found and named, a full disk loses nothing that was saved."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import tdpo
from PIL import Image

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.models.policy import Policy
from tdpo_cli.score.score_file import ScoreFile
from tdpo_cli.storage import disk, run_dir
from tdpo_cli.storage.run_dir import RunDir, damage
from tdpo_cli.train import saving


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def straight(place):
    """Three epochs in one go; only read."""
    outcome = tdpo("train", "--preset", tiny.preset(place), "--out", place / "straight")
    assert outcome.status == 0, outcome.err
    return place / "straight"


@pytest.fixture
def run(straight, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(straight, tmp_path / "run")


def resume(run, *more):
    return tdpo("train", "--resume", "--out", run, *more)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.slow
def test_a_manifest_of_another_epoch_is_damaged(run):
    file = run / "state/epoch_0002/manifest.json"
    file.write_text(file.read_text().replace('"epoch": 2', '"epoch": 6'))
    assert damage(file.parent) == f"{file} is damaged (it names epoch 6)"


def remove(file):
    file.unlink()


# --- damaged states -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["state.pt", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("hurt", [cut, flip, remove])
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(run, straight, name, hurt):
    file = run / "state/epoch_0002" / name
    hurt(file)
    warnings = []
    epoch, _ = RunDir(run).load_state(warnings.append)
    (warning,) = warnings
    named = file.parent if (name, hurt) == ("manifest.json", flip) else file  # a flipped bit in a hash looks like the file's fault
    assert epoch == 1 and str(named) in warning and "Going on from the state before, of epoch 1" in warning


@pytest.mark.slow
def test_the_run_goes_on_from_the_state_before_and_ends_as_if_nothing_had_happened(run, straight):
    flip(run / "state/epoch_0002/state.pt")
    outcome = resume(run)
    assert outcome.status == 0, outcome.err
    assert "warning: " in outcome.err and "epoch_0002/state.pt is damaged" in outcome.err
    assert tiny.outcome_of(run) == tiny.outcome_of(straight)
    assert damage(run / "state/epoch_0002") is None


@pytest.mark.slow
def test_when_both_states_are_damaged_the_message_names_both_and_nothing_is_changed(run):
    for epoch in (1, 2):
        cut(run / f"state/epoch_000{epoch}/state.pt")
    before = (run / "metrics.jsonl").read_bytes()
    outcome = resume(run, "--epochs", 4)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert "epoch_0002/state.pt is damaged" in outcome.err and "epoch_0001/state.pt is damaged" in outcome.err
    assert "model.start_from" in outcome.err
    assert (run / "metrics.jsonl").read_bytes() == before


# --- damaged metrics ------------------------------------------------------------------------------------------------------
def lose_a_line(file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[2:]))


def double_a_line(file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[1:]))


@pytest.mark.parametrize("hurt, line", [(flip, 2), (cut, 3), (remove, 1), (lose_a_line, 2), (double_a_line, 3)])
def test_damaged_metrics_are_repaired_from_the_state(run, straight, hurt, line):
    hurt(run / "metrics.jsonl")
    outcome = resume(run)
    assert outcome.status == 0, outcome.err
    assert f"metrics.jsonl: line {line} is " in outcome.err and "repaired" in outcome.err
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_damaged_environment_is_named(run):
    (run / "env.json").write_text("[{")
    outcome = resume(run, "--epochs", 4)
    assert outcome.status == 2 and "env.json: damaged" in outcome.err and "Traceback" not in outcome.err


# --- leftovers ------------------------------------------------------------------------------------------------------------
def test_what_a_killed_run_left_half_written_is_swept_up(run):
    for folder in ("state/.epoch_0003.tmp", "checkpoints/.epoch_0003.tmp"):
        (run / folder).mkdir()
        (run / folder / "state.pt").write_bytes(b"half")
    (run / ".preset.json.tmp").write_text("{")
    assert len(tiny.leftovers(run)) == 3
    assert resume(run).status == 0
    assert tiny.leftovers(run) == []


def test_a_run_that_goes_on_elsewhere_is_not_swept(run):
    owner = RunDir(run)
    owner.lock()
    (run / "state/.epoch_0003.tmp").mkdir()
    outcome = resume(run)
    assert outcome.status == 2 and "another tdpo process is training in this folder" in outcome.err
    assert tiny.leftovers(run) == ["state/.epoch_0003.tmp"]


# --- a full disk ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["LoRA", *(pytest.param(what, marks=pytest.mark.slow) for what in ("state", "metrics", "critic", "model card", "preview"))]
)
def test_a_full_disk_stops_the_run_and_spares_what_was_saved(run, straight, what, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    def torn(row):  # the first bytes fit, the rest does not
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 3, "rew')
        full()

    before = tiny.outcome_of(run)
    with monkeypatch.context() as patch:
        if what == "state":
            patch.setattr(torch, "save", full)
        elif what == "LoRA":
            patch.setattr(Policy, "save", full)
        elif what == "critic":
            patch.setattr(saving, "save_file", full)
        elif what == "model card":
            real = Path.write_text
            patch.setattr(Path, "write_text", lambda self, *a, **k: full() if self.name == "README.md" else real(self, *a, **k))
        elif what == "preview":
            patch.setattr(Image.Image, "save", full)
            patch.setattr(saving, "preview", lambda job, folder, title, file: folder.save_image(file, Image.new("RGB", (8, 8))))
        else:
            patch.setattr(run_dir, "_finite", torn)
        outcome = resume(run, "--epochs", 4)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert "writing failed: No space left on device. What was saved before is intact." in outcome.err
    assert tiny.leftovers(run) == []
    assert not (run / "state/epoch_0003").exists()
    assert RunDir(run).load_state()[0] == 2
    # room again: the run goes on as if nothing had happened
    assert resume(run, "--epochs", 4).status == 0
    assert tiny.rows(run)[:3] == before[0] and [row["epoch"] for row in tiny.rows(run)] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [pytest.param(300, id="a small file is too large"), pytest.param(20_000, id="a large file is too large")])
def test_the_systems_own_refusal_is_one_message(run, limit):
    """RLIMIT_FSIZE makes the kernel refuse, so that torch and safetensors meet it in their own compiled code."""
    sizes = (run / "metrics.jsonl").stat().st_size
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({sizes + limit}, resource.RLIM_INFINITY))\n"
        f"sys.argv = ['tdpo', 'train', '--resume', '--out', {str(run)!r}, '--epochs', '4']\n"
        "from tdpo_cli.cli import main; main()"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr and "writing failed: " in process.stderr and "What was saved before is intact" in process.stderr
    assert tiny.leftovers(run) == [] and RunDir(run).load_state()[0] == 2


def test_samples_and_scores_on_a_full_disk_are_failures_with_one_message(place, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        outcome = tdpo("sample", "base", "a red circle on a blue background", "--preset", tiny.preset(place), "--out", place / "samples")
    assert outcome.status == 1 and "blue-background.png: writing failed: No space left on device. What was saved before is intact.\n" in outcome.err
    picture = place / "pictures/a red circle.png"
    picture.parent.mkdir()
    Image.new("RGB", (32, 32)).save(picture)
    with monkeypatch.context() as patch:
        patch.setattr(ScoreFile, "_line", full)
        outcome = tdpo("score", picture.parent, "--rewards", "jpeg-compressibility", "--out", place / "scores.jsonl")
    assert outcome.status == 1 and "writing failed: No space left on device" in outcome.err and "Traceback" not in outcome.err


# --- what is not a failing disk ------------------------------------------------------------------------------------------------
def test_memory_that_runs_out_while_something_is_written_is_not_the_disks_fault(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), disk.whole(tmp_path / "file"):
        raise torch.OutOfMemoryError("no memory")
    with pytest.raises(WorkError, match="RuntimeError \\(is the disk full"), disk.whole(tmp_path / "file"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, message", [(errno.EWOULDBLOCK, "another tdpo process is training"), (errno.ENOLCK, "cannot lock .*; choose another")]
)
def test_a_folder_that_cannot_be_locked_is_no_folder_in_use(tmp_path, monkeypatch, error, message):
    def refuse(file, how):
        raise OSError(error, "no")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with pytest.raises(RequestError, match=message):
        disk.lock(tmp_path, "training")
