"""A flow-matching model trained by one process and by two: the same run."""

import json

import pytest
from flow_models import SD3
from helpers import tdpo
from test_world_sizes import PRESET, workers
from tolerances import NOT_COMPARED, assert_same_run

from tdpo_cli.config import preset as presets

FLOW = PRESET.replace('base = "sandbox"', 'base = "sandbox-flow"')


@pytest.mark.slow
def test_one_process_and_two_agree_on_a_flow_model(nursery, tmp_path):
    (tmp_path / "tiny.toml").write_text(FLOW)
    assert tdpo("train", "--preset", tmp_path / "tiny.toml", "--out", tmp_path / "alone", "--epochs", 2).status == 0
    two = workers(nursery, tmp_path, "two", "--processes", 2, "--epochs", 2, "--set", "run.micro_batch=3")
    preset = presets.load(str(tmp_path / "tiny.toml"))
    for epoch, line in enumerate((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()):
        row, seen = json.loads(line), two[0]["epochs"][epoch]
        assert seen["row"] == two[1]["epochs"][epoch]["row"]
        assert not set(two[0]["epochs"][epoch]["x_T"]) & set(two[1]["epochs"][epoch]["x_T"])
        compared = lambda one: {key: value for key, value in one.items() if not key.startswith(NOT_COMPARED)}
        assert_same_run(compared(row), compared(seen["row"]), preset)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "on"])
def test_one_process_of_a_machine_encodes_for_all(nursery, tmp_path, monkeypatch, shard):
    """Embeddings are kept: the second process, and a resume, read no text encoder; the run is the one without a cache."""
    monkeypatch.setitem(nursery.environment, "TDPO_CACHE", str(tmp_path / "cache"))
    settings = FLOW.replace("sandbox-flow", str(SD3)).replace('"aesthetic"', '"jpeg-incompressibility"').replace("critic_init_std", 'name = "ddpo" #')
    (tmp_path / "prompts.txt").write_text("a red circle on a black background\na green ring on a gray background\n")
    (tmp_path / "tiny.toml").write_text(settings.replace('prompts = "sandbox"', f'prompts = "{tmp_path / "prompts.txt"}"'))
    arguments = ("--processes", 2, "--set", "run.micro_batch=4", "--set", f"run.shard={shard}")
    first = workers(nursery, tmp_path, "kept", *arguments, "--epochs", 1)
    assert [one["text_encoders_read"] for one in first] == [3, 0]
    (tmp_path / "kept-seen").rename(tmp_path / "kept-before")
    again = workers(nursery, tmp_path, "kept", *arguments, "--epochs", 2, "--resume")
    assert [one["text_encoders_read"] for one in again] == [0, 0]
    without = workers(nursery, tmp_path, "without", *arguments, "--epochs", 2, "--set", "run.cache_limit=none")
    assert [one["text_encoders_read"] for one in without] == [3, 3]
    weights = [one["epochs"][-1]["weights"] for one in (*again, *without)]
    assert len(set(weights)) == 1
