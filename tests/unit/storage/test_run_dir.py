"""Facts about the run folder: nothing half-written, nothing overwritten, every epoch once."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import make_preset

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.storage.run_dir import RunDir, damage, epoch_name, hash_file


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def states(run):
    """A run with the states of epochs 0 and 1."""
    run.start(make_preset())
    for epoch in (0, 1):
        run.save_state(epoch, {"weights": torch.full((3,), float(epoch))}, "digest")
    return run


def write_weights(folder):
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")


def save(run, epoch, keep_last=None):
    return run.save_checkpoint(epoch, write_weights, "digest", keep_last)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# --- starting -----------------------------------------------------------------------------------------------------------
def test_a_preset_comes_back_as_written(run):
    preset = make_preset(reward__watch=["gold"], run__seed=7)
    run.start(preset)
    assert run.read_preset() == preset


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run):
    run.start(make_preset(run__seed=1))
    with pytest.raises(RequestError, match="already holds a run. Continue it with --resume, or choose another --out"):
        run.start(make_preset(run__seed=2))
    assert run.read_preset().run.seed == 1


def test_a_folder_without_a_run_is_named(run):
    with pytest.raises(RequestError, match="no run there"):
        run.read_preset()


def test_a_damaged_preset_is_named(run):
    run.start(make_preset())
    (run.path / "preset.json").write_text('{"run": ')
    with pytest.raises(RequestError, match="preset.json: damaged"):
        run.read_preset()


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(run):
    run.lock()
    with pytest.raises(RequestError, match="another tdpo process is training in this folder"):
        RunDir(run.path).lock()
    run._lock.close()
    RunDir(run.path).lock()


def test_another_process_is_refused_too(run):
    run.lock()
    program = f"from pathlib import Path; from tdpo_cli.storage.run_dir import RunDir; RunDir(Path({str(run.path)!r})).lock()"
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert second.returncode != 0 and "another tdpo process" in second.stderr


def test_a_place_that_cannot_be_written_is_a_wrong_request(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run").lock()


def test_looking_whether_a_place_is_free_writes_nothing(run, tmp_path):
    run.must_be_free()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file/run: cannot be written: .*file is a file"):
        RunDir(tmp_path / "file" / "run").must_be_free()


def test_every_start_adds_an_environment(run):
    run.start(make_preset())
    assert run.read_environments() == []
    run.add_environment({"micro_batch": 4})
    run.add_environment({"micro_batch": 8})
    assert run.read_environments() == [{"micro_batch": 4}, {"micro_batch": 8}]


# --- metrics ------------------------------------------------------------------------------------------------------------
def test_rows_are_appended_one_line_each(run):
    run.start(make_preset())
    run.log({"epoch": 0, "loss": 0.5})
    run.log({"epoch": 1, "loss": None})
    assert (run.path / "metrics.jsonl").read_text() == '{"epoch": 0, "loss": 0.5}\n{"epoch": 1, "loss": null}\n'
    assert run.read_metrics() == [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": None}]


def test_no_metrics_yet_are_no_rows(run):
    assert run.read_metrics() == []


def test_nan_and_infinity_become_null(run):
    run.start(make_preset())
    run.log({"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1.5})
    assert (run.path / "metrics.jsonl").read_text() == '{"a": null, "b": null, "c": null, "d": 1.5}\n'


@pytest.mark.parametrize("torn", ['{"epoch": 1, "lo', '{"epoch": 1}'])
def test_a_torn_last_line_is_no_row(run, torn):
    run.start(make_preset())
    run.log({"epoch": 0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(torn)  # no newline: the writer died
    assert run.read_metrics() == [{"epoch": 0}]


def test_taking_back_drops_repeated_epochs_and_mends_a_torn_line(run):
    run.start(make_preset())
    for epoch in range(3):
        run.log({"epoch": epoch, "x": 0.1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3')
    run.take_back_metrics(2)
    run.log({"epoch": 2, "x": 0.1})
    assert (run.path / "metrics.jsonl").read_text() == "".join(f'{{"epoch": {epoch}, "x": 0.1}}\n' for epoch in range(3))


def test_taking_back_nothing_leaves_the_bytes_alone(run):
    run.start(make_preset())
    run.log({"epoch": 0, "x": 1e-7, "y": 1 / 3, "z": None})
    before = (run.path / "metrics.jsonl").read_bytes()
    run.take_back_metrics(1)
    assert (run.path / "metrics.jsonl").read_bytes() == before


# --- state --------------------------------------------------------------------------------------------------------------
def test_the_newest_state_is_loaded(states):
    epoch, state = states.load_state()
    assert epoch == 1 and state["weights"].tolist() == [1, 1, 1]


def test_a_run_without_a_finished_epoch_has_no_state(run):
    run.start(make_preset())
    assert run.load_state() is None


def test_the_two_newest_states_are_kept(states):
    states.save_state(2, {}, "digest")
    assert contents(states.path / "state") == ["epoch_0001", "epoch_0002"]


def test_a_damaged_newest_state_falls_back_to_the_one_before(states):
    (states.path / "state/epoch_0001/state.pt").write_bytes(b"torn")
    assert states.load_state()[0] == 0


def test_if_no_state_is_whole_the_error_names_them(states):
    for epoch in (0, 1):
        (states.path / f"state/{epoch_name(epoch)}/state.pt").write_bytes(b"torn")
    with pytest.raises(WorkError, match="epoch_0001/state.pt is damaged.*epoch_0000/state.pt is damaged"):
        states.load_state()


def test_damage_names_what_is_wrong(states):
    folder = states.path / "state/epoch_0001"
    assert damage(folder) is None
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damage(folder) == f"{folder / 'state.pt'} is damaged (its hash differs from the manifest)"
    (folder / "state.pt").unlink()
    assert damage(folder) == f"{folder / 'state.pt'} is missing"
    (folder / "manifest.json").write_text("{}")
    assert damage(folder).startswith(f"{folder / 'manifest.json'} is damaged")


# --- atomic folders -------------------------------------------------------------------------------------------------------
def test_a_checkpoints_manifest_hashes_every_file(run):
    folder = save(run, 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["epoch"], manifest["preset"]) == (4, "digest")
    assert manifest["files"] == {name: hash_file(folder / name) for name in ("weights.bin", "unet/config.json")}
    assert manifest["files"]["weights.bin"] == hashlib.sha256(b"weights").hexdigest()
    assert damage(folder) is None


def test_a_writer_that_dies_leaves_no_folder_of_that_name(run):
    def dies(folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(0, dies, "digest", None)
    assert not (run.path / "checkpoints" / epoch_name(0)).exists()
    with pytest.raises(RequestError, match="no checkpoint there yet"):
        run.checkpoint()


def test_what_a_dead_writer_left_does_not_get_into_the_next_checkpoint(run):
    aside = run.path / "checkpoints" / ".epoch_0000.tmp"
    aside.mkdir(parents=True)
    (aside / "old.bin").write_bytes(b"old")
    assert contents(save(run, 0)) == ["manifest.json", "unet", "weights.bin"]
    assert contents(run.path / "checkpoints") == ["epoch_0000"]


def test_an_epoch_that_is_run_again_replaces_its_checkpoint(run):
    save(run, 0)
    (run.path / "checkpoints/epoch_0000/extra").write_text("")
    assert "extra" not in contents(save(run, 0))


def test_a_full_disk_is_one_clear_message(run, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(WorkError, match="writing failed: No space left on device. What was saved before is intact"):
        run.save_checkpoint(0, full, "digest", None)


# --- checkpoints --------------------------------------------------------------------------------------------------------
def test_all_checkpoints_are_kept_unless_told(run):
    for epoch in range(4):
        save(run, epoch)
    assert contents(run.path / "checkpoints") == [epoch_name(epoch) for epoch in range(4)]


def test_keep_last_keeps_the_newest(run):
    for epoch in (8, 9, 10, 11):
        save(run, epoch, keep_last=2)
    assert contents(run.path / "checkpoints") == ["epoch_0010", "epoch_0011"]


def test_the_last_checkpoint_or_the_one_asked_for(run):
    for epoch in (4, 9):
        save(run, epoch)
    assert run.checkpoint().name == "epoch_0009"
    assert run.checkpoint(4).name == "epoch_0004"
    with pytest.raises(RequestError, match="no checkpoint of epoch 5. There are: epoch_0004, epoch_0009"):
        run.checkpoint(5)


def test_a_checkpoint_beyond_epoch_9999_is_still_the_last(run):
    for epoch in (9999, 10000):
        save(run, epoch, keep_last=1)
    assert run.checkpoint().name == "epoch_10000"
