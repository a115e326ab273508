"""Facts about how far a reward rose, and about the verdict on it."""

import json
import random
from pathlib import Path

import pytest
import tiny
from helpers import make_preset, tdpo

from tdpo_cli.overoptimisation import verdict
from tdpo_cli.overoptimisation.verdict import rise


def curve(means, std=2.0):
    # only epoch 0's spread counts
    return [{"rewards/r/mean": mean, "rewards/r/std": std if epoch == 0 else 99.0} for epoch, mean in enumerate(means)]


@pytest.mark.parametrize(
    "means, expected",
    [
        ([1.0, 4.0], (4 - 1) / 2),
        ([1.0, 9.0, 9.0, 4.0], (4 - 1) / 2),  # fewer than five epochs: first and last
        (range(10), (8.5 - 0.5) / 2),  # two each
        (range(14), (12.5 - 0.5) / 2),  # a fifth of 14 is 2
        (range(25), (22 - 2) / 2),
        ([4.0, 1.0], -1.5),
    ],
)
def test_last_fifth_minus_first_fifth_in_units_of_epoch_0s_std(means, expected):
    assert rise(curve(list(means)), "r") == pytest.approx(expected)


@pytest.mark.parametrize("rows", [[], curve([1.0]), curve([1.0, 2.0], std=0.0), curve([1.0, 2.0], std=None), curve([1.0, None])])
def test_without_two_epochs_a_spread_and_all_means_there_is_no_rise(rows):
    assert rise(rows, "r") is None


# --- the verdict ----------------------------------------------------------------------------------------------------------
def curves(trained, others, gold=None, scatter=0.03, seed=0):
    """Rows of a run: `trained` and `others` in sd of epoch 0, with a little scatter; raw scale 5 + 2 x and 0.2 + 0.1 x."""
    draw = random.Random(seed)
    rows = []
    for epoch, (a, b) in enumerate(zip(trained, others, strict=True)):
        rows.append({
            "epoch": epoch,
            "rewards/aesthetic/mean": 5 + 2 * (a + draw.gauss(0, scatter) * (epoch > 0)), "rewards/aesthetic/std": 2.0,
            "rewards/pickscore/mean": 0.2 + 0.1 * (b + draw.gauss(0, scatter) * (epoch > 0)), "rewards/pickscore/std": 0.1,
            "rewards/gold/mean": 0.0 if gold is None else gold[epoch], "rewards/gold/std": 1.0,
        })  # fmt: skip
    return rows


def preset(watch=("gold", "pickscore"), **settings):
    return make_preset(reward__train="aesthetic", reward__watch=list(watch), **settings)


RAMP = [i / 20 for i in range(40)]
PEAK_AT_20 = [min(i, 40 - i) / 20 for i in range(40)]
PLATEAU_AT_20 = [min(i, 20) / 20 for i in range(40)]
FLAT = [0.0] * 40


@pytest.mark.parametrize(
    "trained, others, kind, since",
    [
        (RAMP, RAMP, "improving", None),
        (RAMP, PEAK_AT_20, "over-optimising", 20),
        (PLATEAU_AT_20, PEAK_AT_20, None, None),  # the trained one stays: which word depends on its scatter, but not "improving"
        (PEAK_AT_20, PEAK_AT_20, "declining", 20),
        (FLAT, FLAT, "unclear", None),
        (RAMP[:9], RAMP[:9], "too early", None),
    ],
)
def test_the_verdict_on_textbook_curves(trained, others, kind, since):
    found = verdict.read(curves(trained, others), preset())
    if kind is None:
        assert found.kind in ("over-optimising", "declining", "unclear") and found.kind != "improving"
        return
    assert found.kind == kind
    assert found.since == (None if since is None else pytest.approx(since, abs=2))
    assert kind in found.sentence


def test_watched_rewards_that_only_stop_rising_are_an_early_warning():
    kinds = [verdict.read(curves(RAMP, PLATEAU_AT_20, scatter=0.05, seed=seed), preset()).kind for seed in range(100)]
    assert kinds.count("stalled") > 50  # the others: the highest window happens to be a late one
    assert kinds.count("over-optimising") < 5


def test_the_sentence_names_the_changes_since_the_peak():
    found = verdict.read(curves(RAMP, PEAK_AT_20, scatter=0), preset())
    # windows of five: the last is of epochs 35-39, the peak's of 18-22
    assert found.sentence == "aesthetic +0.85 sd, others -0.79 sd since epoch 20: over-optimising"
    assert (found.trained, found.others) == (pytest.approx(0.85), pytest.approx(-0.79))


def test_gold_is_never_read():
    judged = [verdict.read(curves(RAMP, PEAK_AT_20, gold), preset()) for gold in (None, RAMP, PEAK_AT_20, [None] * 40)]
    assert len(set(judged)) == 1
    assert verdict.read(curves(RAMP, PEAK_AT_20), preset(watch=["gold"])).kind == "unwatched"


def test_noise_alone_is_rarely_called_over_optimising():
    """The trained reward rises, the watched ones scatter around nothing, 40 epochs."""
    kinds = [verdict.read(curves(RAMP, FLAT, scatter=0.1, seed=seed), preset()).kind for seed in range(300)]
    assert kinds.count("over-optimising") / 300 < 0.1
    assert kinds.count("improving") / 300 < 0.05


def test_a_missing_score_only_takes_its_epoch_out():
    rows = curves(RAMP, PEAK_AT_20)
    rows[30]["rewards/pickscore/mean"] = None
    assert verdict.read(rows, preset()).kind == "over-optimising"
    rows[0]["rewards/pickscore/mean"] = None  # nothing to measure from
    assert verdict.read(rows, preset()).kind == "too early"


def test_rewards_that_part_make_a_rise_doubtful():
    rows = curves(RAMP, RAMP)
    for row in rows:
        row["agreement"] = 0.9 if row["epoch"] < 20 else 0.5
    found = verdict.read(rows, preset())
    assert (found.kind, found.since) == ("doubtful", pytest.approx(20, abs=1))
    assert "they agree less (0.90 -> 0.50" in found.sentence
    for row in rows[30:]:
        row["agreement"] = 0.85  # they are together again
    assert verdict.read(rows, preset()).kind == "improving"


def test_watched_rewards_that_fall_are_worse_than_doubtful():
    rows = curves(RAMP, PEAK_AT_20)
    for row in rows:
        row["agreement"] = 0.9 - row["epoch"] / 50
    assert verdict.read(rows, preset()).kind == "over-optimising"


def test_stopping_waits_for_patience():
    rows = curves(RAMP, PEAK_AT_20, scatter=0)
    first = next(n for n in range(len(rows)) if verdict.read(rows[:n], preset()).kind == "over-optimising")
    stops = lambda patience: [n for n in range(len(rows) + 1) if verdict.should_stop(rows[:n], preset(run__stop_on_overoptimisation=patience))]
    assert (stops(1)[0], stops(4)[0]) == (first, first + 3)
    assert stops(None) == []


def test_the_best_checkpoint_is_where_the_watched_rewards_are_highest():
    rows = curves(RAMP, PEAK_AT_20, scatter=0)
    assert verdict.best(rows, preset(), [4, 9, 14, 19, 24, 29, 39]) == 19
    assert verdict.best(rows, preset(), []) is None
    assert verdict.best(rows, preset(watch=["gold"]), [4, 9]) is None


# --- in a run ---------------------------------------------------------------------------------------------------------------
SCRIPTED = '''
"""Scores that follow a script, epoch by epoch: four samples each."""
import os, torch
def epoch_of(images):
    return len(open(os.environ["METRICS"]).readlines()) if os.path.exists(os.environ["METRICS"]) else 0
def trained(images, prompts):
    return 0.1 * epoch_of(images) + torch.linspace(-1, 1, len(images))
def other(images, prompts):
    e = epoch_of(images)
    return 0.1 * min(e, 16 - e) + torch.linspace(-1, 1, len(images))
'''


@pytest.mark.slow
def test_a_run_stops_names_its_best_checkpoint_and_stays_stopped(tmp_path, monkeypatch):
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    run = tmp_path / "run"
    monkeypatch.setenv("METRICS", str(run / "metrics.jsonl"))
    file = tiny.preset(
        tmp_path, rollout__steps=1, reward__train=f"{tmp_path}/scripted.py:trained", reward__watch=[f"{tmp_path}/scripted.py:other"],
        algorithm__name="ddpo", update__batch_size=4, run__epochs=30, run__save_every=2, run__keep_last=2, run__stop_on_overoptimisation=2,
    )  # fmt: skip
    straight = tdpo("train", "--preset", file, "--out", run, "--json")
    assert straight.status == 0, straight.err
    report = json.loads(straight.out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert report["stopped"] and 12 < len(rows) < 30
    assert report["verdict"]["kind"] == "over-optimising" and report["verdict"]["since"] == pytest.approx(8, abs=1)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(kept) == 3 and Path(report["best_checkpoint"]).name == kept[0] == "epoch_0007"  # spared, besides the newest two
    assert kept[-1] == f"epoch_{len(rows) - 1:04d}"
    again = tdpo("train", "--resume", "--out", run, "--trust-rewards")
    assert again.status == 0 and "stopped after epoch" in again.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)
    further = tdpo("train", "--resume", "--out", run, "--trust-rewards", "--set", "run.stop_on_overoptimisation=none", "--epochs", len(rows) + 1)
    assert further.status == 0 and len((run / "metrics.jsonl").read_text().splitlines()) == len(rows) + 1


# --- constraints and several rewards --------------------------------------------------------------------------------------
def rows_of(**curves):
    """Means per epoch; every standard deviation is 1."""
    names = {name: list(means) for name, means in curves.items()}
    epochs = range(len(next(iter(names.values()))))
    return [{"epoch": e, **{f"rewards/{n}/{k}": (m[e] if k == "mean" else 1.0) for n, m in names.items() for k in ("mean", "std")}} for e in epochs]


def test_a_constraint_does_not_judge_and_the_sentence_says_so():
    rising, falling = [e / 10 for e in range(30)], [-e / 10 for e in range(30)]
    rows = rows_of(aesthetic=rising, hpsv2=falling, imagereward=rising)
    watched = {"reward__train": "aesthetic", "reward__watch": ("hpsv2", "imagereward")}
    assert verdict.read(rows, make_preset(**watched)).kind != "improving"
    found = verdict.read(rows, make_preset(**watched, reward__at_least={"hpsv2": -0.2}))
    assert found.kind == "improving" and "others without hpsv2, which constrains, +2.50 sd" in found.sentence


def test_a_run_whose_watched_rewards_all_constrain_has_no_verdict():
    preset = make_preset(reward__train="aesthetic", reward__watch=("gold", "hpsv2"), reward__at_least={"hpsv2": -0.2})
    found = verdict.read(rows_of(aesthetic=range(30), hpsv2=range(30), gold=range(30)), preset)
    assert found.kind == "unwatched" and "beside hpsv2, which constrains" in found.sentence


def test_several_training_rewards_are_judged_by_their_combined_curve():
    preset = make_preset(reward__train="a", reward__train_weights={"a": 1.0, "b": 0.5}, reward__watch=("hpsv2",))
    rising, falling = [e / 10 for e in range(30)], [-e / 10 for e in range(30)]
    found = verdict.read(rows_of(a=falling, b=falling, combined=rising, hpsv2=falling), preset)
    assert found.kind == "over-optimising" and found.sentence.startswith("a + 0.5 b +2")
