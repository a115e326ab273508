"""Groups of GRPO whose images are sampled by different processes: the same run."""

import json

import pytest
import tiny
import torch
from helpers import tdpo
from test_world_sizes import PRESET, workers
from tolerances import NOT_COMPARED, assert_same_run

from tdpo_cli.config import preset as presets
from tdpo_cli.console import Console
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.world import World
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.state import build

GROUPS = PRESET.replace("critic_init_std = 0.11\nreset_every = 2\n", 'name = "grpo"\nguard = true\n').replace(
    "samples_per_epoch = 16", "samples_per_epoch = 16\nimages_per_prompt = 4"
)
GROUPS = "\n".join(line for line in GROUPS.splitlines() if not line.startswith(("reset_target", "critic_", "clip_range_critic")))
GROUPS = GROUPS.replace("[run]", "kl_coef = 1.0\nema_decay = 0.5\nema_every = 2\n\n[run]")

HELD = GROUPS.replace('watch = ["gold"]', 'watch = ["gold"]\nat_least = {hpsv2 = 1.0}\ntrain_weights = {aesthetic = 1.0, pickscore = 0.5}')


@pytest.mark.slow
@pytest.mark.parametrize("settings", [GROUPS, HELD], ids=["one reward", "several and a constraint"])
def test_one_process_and_two_agree_with_groups_split_across_them(nursery, tmp_path, settings):
    (tmp_path / "tiny.toml").write_text(settings)
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
    if settings is HELD:
        assert rows[1]["constraints/hpsv2/multiplier"] == pytest.approx(0.1)  # 1 sd short in epoch 0
        assert rows[1]["rewards/combined/mean"] != 0


TINY = {"rollout__samples_per_epoch": 4, "rollout__steps": 2, "rollout__images_per_prompt": 2, "algorithm__name": "grpo", "algorithm__guard": True}
MORE = [
    ("reward.train_weights", {"aesthetic": 1.0, "pickscore": 0.5}), ("reward.at_least.hpsv2", 1.0),
    ("update.kl_coef", 1.0), ("update.ema_decay", 0.5), ("update.ema_every", 1), ("update.clip_range", 0.5),
]  # fmt: skip


def held_job(folder):
    return build(presets.load(str(tiny.preset(folder, reward__train="aesthetic", **TINY)), MORE), World(), Plan.of(4))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.slow
def test_average_multipliers_and_the_scale_of_several_rewards_go_on_exactly_after_a_resume(tmp_path):
    straight, cut = held_job(tmp_path), held_job(tmp_path)
    rows = [run_epoch(straight, epoch, Console(quiet=True)) for epoch in range(3)]
    for epoch in range(2):
        run_epoch(cut, epoch, Console(quiet=True))
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    resumed = held_job(tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    row = run_epoch(resumed, 2, Console(quiet=True))
    assert same(straight.state_dict(), resumed.state_dict())
    compared = lambda one: {key: value for key, value in one.items() if not key.startswith(tiny.TIMING)}
    assert compared(row) == compared(rows[2])
    assert rows[0]["constraints/hpsv2/multiplier"] == 0 < rows[1]["constraints/hpsv2/multiplier"] != rows[2]["constraints/hpsv2/multiplier"]
