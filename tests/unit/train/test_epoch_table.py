"""The table that a run prints: its columns, its width, what it says in words."""

import pytest

from tdpo_cli.config import preset as presets
from tdpo_cli.train import epoch_table


def row(epoch, preset, mean, **more):
    rewards = {f"rewards/{name}/{what}": value for name in preset.rewards for what, value in (("mean", mean), ("std", 0.5))}
    return rewards | {"epoch": epoch, "approx_kl": 1.2e-4, "policy_clip_fraction": 0.123, "seconds/total": 4.84} | more


def test_quickstart_has_a_column_for_each_watched_reward_within_80_columns():
    preset = presets.load("quickstart")
    first, last = row(0, preset, 4.0), row(24, preset, 4.5)
    head, line = epoch_table.heading(preset)[-1], epoch_table.line(last, first, preset)
    assert set(preset.reward.watch) <= set(head.split())
    assert len(line) == len(head) <= 80
    assert max(map(len, epoch_table.heading(preset))) <= 80
    assert line.split() == ["24/24", "4.500", "+1.00", *["+1.00"] * len(preset.reward.watch), "0.0001", "12%", "4.8s"]


def test_many_watched_rewards_share_one_column():
    preset = presets.load("quickstart", [("reward.watch", ["gold", "pickscore", "hpsv2", "imagereward", "jpeg-compressibility"])])
    first = row(0, preset, 4.0)
    last = row(1, preset, 4.0) | {"rewards/hpsv2/mean": 5.0, "rewards/gold/mean": 9.0}
    head, line = epoch_table.heading(preset)[-1], epoch_table.line(last, first, preset)
    assert "others" in head.split() and "hpsv2" not in head and len(head) <= 80
    assert dict(zip(head.split(), line.split(), strict=True))["others"] == "+0.50"  # 2 sd of one of four; gold is not read


def test_resets_and_skipped_steps_are_said_below_the_line():
    preset = presets.load("quickstart")
    first = row(0, preset, 4.0)
    text = epoch_table.line(row(1, preset, None, reset=12, dormant_fraction=0.25, skipped_steps=1), first, preset)
    assert "reset 12 neurons, 25% dormant" in text and "skipped 1 of" in text
    assert max(map(len, text.splitlines())) <= 80
    assert " - " in text.splitlines()[0]  # a mean that is missing


@pytest.mark.parametrize(("seconds", "shown"), [(4.84, "4.8s"), (59.99, "60.0s"), (245, "4m05s"), (7800, "2h10m")])
def test_time_stays_short(seconds, shown):
    preset = presets.load("quickstart")
    first = row(0, preset, 4.0)
    assert epoch_table.line(first | {"seconds/total": seconds}, first, preset).endswith(f" {shown}")
