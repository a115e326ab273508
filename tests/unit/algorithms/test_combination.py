"""Several rewards as one, and multipliers, by hand."""

import dataclasses

import pytest
import torch
from helpers import LinearPolicy, make_preset, make_trajectory

from tdpo_cli import algorithms
from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.algorithms.combination import Combination, Constraint, combined, next_multiplier
from tdpo_cli.errors import WorkError

A, B = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.4, 0.1, 0.2, 0.1])  # scores of prompts a, b, a, b
HELD = {"reward__train": "aesthetic", "reward__watch": ("hpsv2",), "reward__at_least": {"hpsv2": -0.2}}


def combination_of(**settings):
    return Combination(make_preset(**settings))


# --- the sum ------------------------------------------------------------------------------------------------------------
def test_combined_is_the_weighted_mean_of_what_trains_and_the_multipliers_share():
    one, half, held = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.0]), torch.tensor([10.0, 2.0])
    normed = {"a": one, "b": half, "c": held}
    assert combined(normed, {"a": 1.0, "b": 0.5}, {}).tolist() == pytest.approx([(1 + 2) / 1.5, -1 / 1.5])
    assert combined(normed, {"a": 1.0}, {"c": 0.5}).tolist() == pytest.approx([(1 + 5) / 1.5, (-1 + 1) / 1.5])
    assert combined(normed, {"a": 1.0, "b": 1.0}, {"c": 1.0}).tolist() == pytest.approx([(2.5 + 10) / 2, (-0.5 + 2) / 2])


def test_combined_of_one_reward_is_that_reward_to_the_last_bit():
    reward = torch.rand(50, dtype=torch.float64)
    assert combined({"a": reward, "c": 1 / reward}, {"a": 1.0}, {"c": 0.0}).equal(reward)


@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("name", ["ddpo", "tdpo", "grpo"])
def test_credit_does_not_depend_on_a_rewards_scale(name, factor):
    preset = make_preset(
        algorithm__name=name, reward__train="a", reward__train_weights={"a": 1.0, "b": 0.5}, reward__min_count=2, algorithm__advantage_std="epoch"
    )
    everyone = make_trajectory(LinearPolicy(), 4)
    everyone = dataclasses.replace(everyone, values=torch.zeros_like(everyone.values))
    plain, scaled = (
        credit_of(algorithms.make(preset), everyone, {"a": A, "b": scores}, Combination(preset)).advantages for scores in (B, factor * B + 7)
    )
    assert scaled.numpy() == pytest.approx(plain.numpy(), abs=2e-3)  # the small numbers that are added to standard deviations


def test_each_reward_is_normalised_by_its_prompts_before_it_is_weighted():
    preset = make_preset(algorithm__name="grpo", reward__train="a", reward__train_weights={"a": 3.0, "b": 1.0})
    credit = credit_of(algorithms.make(preset), make_trajectory(LinearPolicy(), 4), {"a": A, "b": B}, Combination(preset))
    # a: -1 and 1 in each prompt; b: 1 and -1 in prompt a, nothing in prompt b, whose scores are equal
    assert credit.advantages[:, 0].tolist() == pytest.approx([(-3 + 1) / 4, -3 / 4, (3 - 1) / 4, 3 / 4], abs=1e-3)


def test_a_sample_without_one_of_its_rewards_has_no_credit_and_touches_no_statistics():
    preset = make_preset(algorithm__name="ddpo", reward__train="a", reward__train_weights={"a": 1.0, "b": 1.0}, reward__min_count=1)
    everyone, missing = make_trajectory(LinearPolicy(), 4), torch.tensor([0.4, float("nan"), 0.2, 0.1])
    whole, alone = algorithms.make(preset), algorithms.make(preset)
    credit = credit_of(whole, everyone, {"a": A, "b": missing}, Combination(preset))
    assert credit.advantages[1].isnan().all() and credit.advantages[[0, 2, 3]].isfinite().all()
    for name, scores in (("a", A), ("b", B)):
        alone.normalise(("a", "a", "b"), scores[[0, 2, 3]], name)
    assert whole.state_dict() == alone.state_dict()


# --- multipliers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "short", "after"),
    [
        (0.0, 0.5, 0.05),  # violated: 0.1 x 0.5
        (0.3, -0.5, 0.295),  # it holds: 0.01 x -0.5
        (0.3, 0.0, 0.3),
        (0.001, -5.0, 0.0),  # never below 0
        (4.99, 3.0, 5.0),  # never above the largest
    ],
)
def test_multiplier_rises_while_violated_and_falls_a_tenth_as_fast(before, short, after):
    assert next_multiplier(before, short, rate=0.1, most=5.0) == pytest.approx(after)


def test_change_is_smoothed_before_it_is_compared():
    one = Constraint(bound=-0.2)
    one.after_epoch(-1.0, rate=0.1, most=5.0)
    assert one.change == pytest.approx(-0.3) and one.multiplier == pytest.approx(0.1 * 0.1)
    one.after_epoch(-1.0, rate=0.1, most=5.0)
    assert one.change == pytest.approx(-0.51) and one.multiplier == pytest.approx(0.01 + 0.1 * 0.31)
    one.after_epoch(4.0, rate=0.1, most=5.0)
    assert one.change == pytest.approx(0.843) and one.multiplier == pytest.approx(0.041 - 0.01 * 1.043)


def scores_of(shift):
    """aesthetic as it is; hpsv2 has mean 1 and standard deviation 0.5, moved by `shift` of them."""
    return {"aesthetic": A, "hpsv2": torch.tensor([0.5, 1.5, 0.5, 1.5]) + 0.5 * shift}


def test_a_multiplier_is_logged_as_used_and_acts_from_the_next_epoch():
    combination, normed = combination_of(**HELD), {"aesthetic": A.double(), "hpsv2": B.double()}
    combination.begin(scores_of(0))
    assert combination.after_epoch(scores_of(0)) == {"constraints/hpsv2/multiplier": 0.0, "constraints/hpsv2/change": 0.0}
    combination.begin(scores_of(-2))  # what epoch 0 was stays
    assert combination(normed).equal(A.double())
    row = combination.after_epoch(scores_of(-2))
    assert row == {"constraints/hpsv2/multiplier": 0.0, "constraints/hpsv2/change": pytest.approx(-0.6)}
    assert combination(normed).tolist() == pytest.approx(((A + 0.04 * B) / 1.04).tolist())
    assert combination.after_epoch(scores_of(0))["constraints/hpsv2/multiplier"] == pytest.approx(0.1 * (0.6 - 0.2))


def test_an_epoch_without_scores_of_a_constraint_moves_nothing():
    combination = combination_of(**HELD)
    combination.begin(scores_of(0))
    before = combination.state_dict()
    combination.after_epoch(scores_of(float("nan")))
    assert combination.state_dict() == before


def test_a_combination_goes_on_after_a_round_trip():
    straight, resumed = combination_of(**HELD), combination_of(**HELD)
    straight.begin(scores_of(0))
    straight.after_epoch(scores_of(-3))
    resumed.load_state_dict(straight.state_dict())
    resumed.begin(scores_of(5))
    assert resumed.after_epoch(scores_of(-1)) == straight.after_epoch(scores_of(-1))
    assert resumed.state_dict() == straight.state_dict()


# --- the curve of several rewards ---------------------------------------------------------------------------------------
def test_the_combined_curve_counts_changes_in_standard_deviations_of_epoch_0():
    combination = combination_of(reward__train="a", reward__train_weights={"a": 1.0, "b": 3.0})
    first = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([10.0, 30.0])}  # means 1 and 20, standard deviations 1 and 10
    combination.begin(first)
    assert combination.trained(first).mean() == 0
    assert combination.trained({"a": torch.tensor([2.0]), "b": torch.tensor([40.0])}).tolist() == [(1 + 3 * 2) / 4]


def test_the_curve_of_one_reward_is_its_scores():
    assert combination_of(**HELD).trained(scores_of(0)) is not None
    assert combination_of(**HELD).trained({"aesthetic": A, "hpsv2": B}) is A


def test_a_reward_without_spread_cannot_be_measured_against():
    with pytest.raises(WorkError, match="hpsv2 gave all images of the first epoch the same score"):
        combination_of(**HELD).begin({"aesthetic": A, "hpsv2": torch.ones(4)})
