"""A flow-matching model trained by one process and by two: the same run."""

import json

import pytest
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
