"""Facts about advantages within groups, by hand."""

import dataclasses

import pytest
import torch
from helpers import LinearPolicy, make_preset, make_trajectory

from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.algorithms.grpo import GRPO, group_advantages
from tdpo_cli.randomness import Randomness

REWARDS = torch.tensor([1.0, 10.0, 3.0, 10.0])  # of prompts a, b, a, b: a's mean is 2 and its std 1, b's are equal; std of all 4.0620192


@pytest.mark.parametrize(("std", "scale"), [("group", 1 + 1e-4), ("epoch", 4.062019202317980 + 1e-4), ("none", 1.0)])
def test_advantages_by_hand(std, scale):
    advantages = group_advantages(("a", "b", "a", "b"), REWARDS, std)
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == pytest.approx([-1 / scale, 0, 1 / scale, 0], rel=1e-12)


@pytest.mark.parametrize("std", ["group", "epoch", "none"])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(std):
    """0.1 three times has a mean that is not 0.1."""
    equal = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64)
    assert equal[:3].sum() / 3 != 0.1
    assert group_advantages("aaab", equal, std).tolist() == [0, 0, 0, 0]


def credit(rewards, **settings):
    settings = {"algorithm__name": "grpo", "rollout__images_per_prompt": 2, "rollout__samples_per_epoch": 4, "update__batch_size": 4, **settings}
    everyone = make_trajectory(LinearPolicy(), 4)  # prompts a, b, a, b
    return credit_of(GRPO(make_preset(**settings)), everyone, {"any": rewards})


def test_every_step_of_a_sample_has_the_clipped_advantage():
    given = credit(REWARDS, algorithm__advantage_std="none", algorithm__advantage_clip=0.5)
    assert given.advantages.tolist() == [[-0.5] * 3, [0.0] * 3, [0.5] * 3, [0.0] * 3]
    assert given.returns[:, 0].tolist() == given.normed_rewards.tolist() == [-1, 0, 1, 0]
    assert credit(REWARDS, algorithm__advantage_std="none", algorithm__advantage_clip=0.0).advantages[:, 0].tolist() == [-1, 0, 1, 0]


def test_a_reward_that_is_missing_leaves_its_group_one_smaller():
    given = credit(torch.tensor([1.0, 2.0, float("nan"), 4.0]), algorithm__advantage_std="none")
    assert given.advantages[:, 0].nan_to_num(99).tolist() == [0, -1, 99, 1]


def test_groups_are_by_the_prompt_as_the_text_encoder_reads_it():
    everyone = dataclasses.replace(make_trajectory(LinearPolicy(), 2), prompts=("A cat", "a  cat"), prompt_keys=("a cat", "a cat"))
    preset = make_preset(algorithm__name="grpo", algorithm__advantage_std="none")
    assert GRPO(preset).credit(everyone, torch.tensor([0.0, 1.0])).advantages[:, 0].tolist() == [-0.5, 0.5]


def test_the_prompts_of_an_epoch_are_distinct_and_a_function_of_seed_and_epoch():
    choices = [str(i) for i in range(10)]
    first, again, later, other = (Randomness(seed).groups(epoch, 5, 3, choices) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert first == again and len({first, later, other}) == 3
    assert len(first) == 15 and len(set(first)) == 5
    assert all(len(set(first[i : i + 3])) == 1 for i in range(0, 15, 3))
