"""Groups of GRPO whose images are sampled by different processes: the same run."""

import json

import pytest
from helpers import tdpo
from test_world_sizes import PRESET, workers
from tolerances import NOT_COMPARED, assert_same_run

from tdpo_cli.config import preset as presets

GROUPS = PRESET.replace("critic_init_std = 0.11\nreset_every = 2\n", 'name = "grpo"\nguard = true\n').replace(
    "samples_per_epoch = 16", "samples_per_epoch = 16\nimages_per_prompt = 4"
)
GROUPS = "\n".join(line for line in GROUPS.splitlines() if not line.startswith(("reset_target", "critic_", "clip_range_critic")))
GROUPS = GROUPS.replace("[run]", "kl_coef = 1.0\nema_decay = 0.5\nema_every = 2\n\n[run]")


@pytest.mark.slow
def test_one_process_and_two_agree_with_groups_split_across_them(nursery, tmp_path):
    (tmp_path / "tiny.toml").write_text(GROUPS)
    assert tdpo("train", "--preset", tmp_path / "tiny.toml", "--out", tmp_path / "alone", "--epochs", 2).status == 0
    two = workers(nursery, tmp_path, "two", "--processes", 2, "--epochs", 2, "--set", "run.micro_batch=3")
    preset = presets.load(str(tmp_path / "tiny.toml"))
    rows = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    for epoch, row in enumerate(rows):
        seen = two[0]["epochs"][epoch]
        assert seen["row"] == two[1]["epochs"][epoch]["row"]
        sides = [set(worker["epochs"][epoch]["x_T"]) for worker in two]
        group = lambda sample: int(sample) // 4
        assert {group(sample) for sample in sides[0]} & {group(sample) for sample in sides[1]}, "no group was split"
        compared = lambda row: {key: value for key, value in row.items() if not key.startswith(NOT_COMPARED)}
        assert_same_run(compared(row), compared(seen["row"]), preset)
    assert (rows[0]["kl_loss"], rows[1]["ema"]) > (0, 0)
