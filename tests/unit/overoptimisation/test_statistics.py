"""Facts about the statistics of a cross-evaluation, by hand where a hand can follow."""

import itertools

import numpy as np
import pytest

from tdpo_cli.overoptimisation import statistics
from tdpo_cli.overoptimisation.statistics import estimate, resample

ALL_OF_TWO = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])  # every way to draw two prompts twice


# --- intervals ----------------------------------------------------------------------------------------------------------
def test_resamples_draw_as_many_prompts_as_there_are_and_repeat_with_the_seed():
    draws = resample(7, seed=3, count=50)
    assert draws.shape == (50, 7) and (draws.sum(axis=1) == 7).all() and (draws >= 0).all()
    assert (resample(7, seed=3, count=50) == draws).all() and (resample(7, seed=4, count=50) != draws).any()


def test_an_estimate_by_hand():
    # means of the three resamples: 1, 3, 5
    one = estimate(np.array([[0.0, 2.0], [4.0, 6.0]]), ALL_OF_TWO)
    assert one == pytest.approx({"mean": 3.0, "low": 1 + 0.025 * 4, "high": 5 - 0.025 * 4})


def test_prompts_are_drawn_with_all_their_images():
    """Images that repeat their prompt's value are no further evidence."""
    values = np.random.default_rng(0).normal(size=(20, 1))
    draws = resample(20, seed=0)
    assert estimate(np.repeat(values, 8, axis=1), draws) == pytest.approx(estimate(values, draws))


def test_missing_scores_are_left_out_of_mean_and_interval():
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
    draws = np.array([[1.0, 1, 1], [3, 0, 0], [0, 3, 0], [0, 0, 3]])
    one = estimate(values, draws)
    assert one["mean"] == pytest.approx(3.0)
    # the resamples that drew something: (1+3+5)/3, 1, 4
    assert (one["low"], one["high"]) == (pytest.approx(1 + 0.05 * 2), pytest.approx(4 - 0.05 * 1))


@pytest.mark.parametrize("values, mean", [([[1.0, 3.0]], 2.0), ([[2.0], [np.nan]], 2.0), ([[np.nan]], None)])
def test_one_prompt_gives_no_interval(values, mean):
    values = np.array(values)
    assert estimate(values, resample(len(values), 0)) == {"mean": mean, "low": None, "high": None}


@pytest.mark.parametrize("prompts, at_least", [(48, 0.92), (16, 0.88)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(prompts, at_least):
    """Skewed prompt effects and images around them; the true mean is 1."""
    rng = np.random.default_rng(5)
    draws = resample(prompts, seed=1, count=1000)
    inside = 0
    for _ in range(600):
        values = rng.gamma(4.0, 0.25, size=(prompts, 1)) + 0.5 * rng.normal(size=(prompts, 4))
        one = estimate(values, draws)
        inside += one["low"] < 1 < one["high"]
    assert at_least < inside / 600 < 0.98


# --- one model ----------------------------------------------------------------------------------------------------------
def test_mean_and_std_of_what_is_known():
    assert statistics.spread(np.array([[1.0, 3.0], [np.nan, 5.0]])) == pytest.approx({"mean": 3.0, "std": (8 / 3) ** 0.5})
    assert statistics.spread(np.array([[np.nan]])) == {"mean": None, "std": None}


def test_a_tie_is_half_a_win():
    assert statistics.wins(np.array([[0.5, -0.1, 0.0, np.nan]])) == pytest.approx(np.array([[1, 0, 0.5, np.nan]]), nan_ok=True)


def test_diversity_is_the_mean_over_all_pairs():
    embeds = np.random.default_rng(2).normal(size=(3, 5, 4))
    embeds /= np.linalg.norm(embeds, axis=-1, keepdims=True)
    pairs = list(itertools.combinations(range(5), 2))
    expected = [np.mean([1 - prompt[i] @ prompt[j] for i, j in pairs]) for prompt in embeds]
    assert statistics.pairwise_distance(embeds) == pytest.approx(expected)
    assert statistics.pairwise_distance(embeds[:, :1]) == pytest.approx([np.nan] * 3, nan_ok=True)
    assert statistics.pairwise_distance(np.repeat(embeds[:, :1], 5, axis=1)) == pytest.approx([0.0] * 3, abs=1e-12)


def prompts_of(**columns):
    """reward -> [P,1] from one value a prompt"""
    return {name: np.array(values, dtype=float)[:, None] for name, values in columns.items()}


def test_shares_of_prompts_by_hand():
    values = prompts_of(aesthetic=[1, 1, 1, -1, 0], pickscore=[1, -2, 2, 1, 1], hpsv2=[1, 1, -3, 1, 1])
    assert statistics.share_all_rise(values) == pytest.approx(1 / 5)
    assert statistics.share_trained_rises_others_fall(values, "aesthetic") == pytest.approx(2 / 5)
    assert statistics.share_trained_rises_others_fall(values, "hpsv2") == pytest.approx(1 / 5)


def test_the_true_reward_moves_no_share():
    values = prompts_of(aesthetic=[1, 1, -1], pickscore=[1, -2, 1])
    for gold in ([1, 1, 1], [-9, -9, -9], [np.nan] * 3):
        with_gold = {**values, **prompts_of(gold=gold)}
        assert statistics.share_all_rise(with_gold) == statistics.share_all_rise(values)
        assert statistics.share_trained_rises_others_fall(with_gold, "aesthetic") == statistics.share_trained_rises_others_fall(values, "aesthetic")
        assert statistics.mean_of_others(with_gold, "aesthetic") == pytest.approx(values["pickscore"])


@pytest.mark.parametrize("trained", [None, "gold", "imagereward"])
def test_without_a_trained_reward_that_was_evaluated_nobody_is_compared_with_others(trained):
    values = prompts_of(aesthetic=[1.0, 2.0], gold=[1.0, 2.0])
    assert statistics.mean_of_others(values, trained) is None
    assert statistics.share_trained_rises_others_fall(values, trained) is None


def test_a_prompt_with_a_missing_score_is_left_out_of_the_shares():
    values = prompts_of(aesthetic=[1, np.nan, -1], pickscore=[1, 1, 1])
    assert statistics.share_all_rise(values) == pytest.approx(1 / 2)


# --- the checkpoints of a run ---------------------------------------------------------------------------------------------
def test_peak_to_final_is_paired():
    # the prompts differ by 100, the checkpoints by exactly 0.5 in every prompt
    prompts = np.array([[0.0], [100.0], [200.0]])
    index, one = statistics.peak_to_final(np.stack([prompts, prompts + 2.0, prompts + 1.5]), resample(3, 0))
    assert index == 1
    assert (one["peak"], one["final"]) == (102.0, 101.5)
    assert one["drop"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})


def test_a_reward_that_ends_at_its_peak_drops_by_nothing():
    index, one = statistics.peak_to_final(np.array([[[0.0], [1.0]], [[1.0], [2.0]]]), ALL_OF_TWO)
    assert (index, one["drop"]) == (1, {"mean": 0.0, "low": 0.0, "high": 0.0})


def test_since_best_by_hand():
    trained = np.array([[0, 0], [1, 1], [3, 5]], dtype=float)[:, :, None]
    others = np.array([[0, 0], [2, 2], [1, -1]], dtype=float)[:, :, None]
    best, moved = statistics.since_best(trained, others, ALL_OF_TWO)
    assert best == 1
    assert (moved["trained"]["mean"], moved["others"]["mean"], moved["others_held_out"]["mean"]) == (3.0, -2.0, -2.0)


def test_each_half_is_measured_where_the_other_half_stands_best():
    # even prompts stand best at model 1, odd ones at model 2; the last is 0 everywhere
    others = np.array([[0, 0, 0, 0], [5, 1, 5, 1], [1, 4, 1, 4], [0, 0, 0, 0]], dtype=float)[:, :, None]
    best, moved = statistics.since_best(np.zeros_like(others), others, resample(4, 0))
    assert best == 1
    assert moved["others"]["mean"] == pytest.approx(-3.0)
    assert moved["others_held_out"]["mean"] == pytest.approx(-1.0)  # even prompts at model 2, odd ones at model 1: -1 each


def test_luck_in_choosing_the_best_checkpoint_is_no_fall():
    """The others scatter around nothing at 12 checkpoints: their fall since the best one is rarely clear of 0 on held-out prompts."""
    rng = np.random.default_rng(0)
    draws = resample(48, seed=0, count=400)
    falls = {"others": 0, "others_held_out": 0}
    for _ in range(200):
        others = np.concatenate([np.zeros((1, 48, 1)), rng.normal(size=(12, 48, 1))])
        _, moved = statistics.since_best(np.zeros_like(others), others, draws)
        for name in falls:
            falls[name] += moved[name]["high"] < 0
    assert falls["others_held_out"] / 200 < 0.07 < falls["others"] / 200
