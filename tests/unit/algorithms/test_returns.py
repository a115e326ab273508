"""Facts about returns and advantages: what an epoch's rewards are worth to each step."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import LinearPolicy, make_preset, make_trajectory

from tdpo_cli import algorithms
from tdpo_cli.algorithms.returns import Returns, discounted

REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0])
PLAIN = {"reward__normalise": "none", "algorithm__advantage_norm": "none"}


@pytest.fixture
def everyone():
    return make_trajectory(LinearPolicy(steps=3), samples=4)


def with_kl(everyone, differences):
    """log p - log p_ref as given, the same for every sample."""
    return dataclasses.replace(everyone, ref_log_probs=everyone.log_probs - torch.tensor(differences))


# --- discount ---------------------------------------------------------------------------------------------------------
def test_discounted_by_hand():
    per_step = torch.tensor([[1.0, 2.0, 4.0]])
    assert discounted(per_step, 0.5).tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]]


def test_discounting_leaves_its_input_alone():
    per_step = torch.tensor([[1.0, 2.0]])
    discounted(per_step, 1.0)
    assert per_step.tolist() == [[1, 2]]


def returns_of(preset, everyone):
    """-> (returns, normalised rewards, mean KL) of REWARDS"""
    returns = Returns(preset)
    normed = returns.normalise(everyone.prompt_keys, REWARDS)
    shared, mean_kl = returns(everyone, normed)
    return shared, normed, mean_kl


# --- returns ----------------------------------------------------------------------------------------------------------
def test_only_the_last_step_earns_the_reward(everyone):
    returns, normed, mean_kl = returns_of(make_preset(**PLAIN, algorithm__gamma=0), everyone)
    assert returns.tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 0, 6]]
    assert normed.tolist() == [1, 2, 3, 6]
    assert mean_kl is None


def test_gamma_carries_the_reward_back(everyone):
    returns, _, _ = returns_of(make_preset(**PLAIN, algorithm__gamma=0.5), everyone)
    assert returns[3].tolist() == [1.5, 3, 6]


def test_returns_are_double_precision(everyone):
    assert returns_of(make_preset(), everyone)[0].dtype == torch.float64


def test_clip_binds_after_normalisation_and_leaves_the_log_alone(everyone):
    settings = {"reward__normalise": "global", "reward__clip_range": 0.6, "algorithm__gamma": 0}
    returns, normed, _ = returns_of(make_preset(**settings), everyone)
    expected = (REWARDS.numpy() - 3) / np.std(REWARDS.numpy(), ddof=1)
    assert normed.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert returns[:, -1].tolist() == pytest.approx(expected.clip(-0.6, 0.6).tolist(), abs=1e-6)


def test_rewards_are_standardised_under_the_prompt_as_the_encoder_saw_it(everyone):
    # "a A" and "a" are one prompt to the text encoder
    everyone = dataclasses.replace(everyone, prompts=("A", "b", "a", "B"))
    preset = make_preset(reward__min_count=2, algorithm__gamma=0)
    _, normed, _ = returns_of(preset, everyone)
    assert normed.tolist() == pytest.approx([-1, -1, 1, 1], abs=1e-5)


# --- KL shaping -------------------------------------------------------------------------------------------------------
def test_kl_shaping_is_scaled_by_beta_and_by_the_coefficient(everyone):
    preset = make_preset(**PLAIN, algorithm__gamma=0, algorithm__kl_penalty="abs", algorithm__kl_penalty_coef=0.5, algorithm__init_kl_coef=0.2)
    returns, _, mean_kl = returns_of(preset, with_kl(everyone, [1.0, -2.0, 4.0]))
    assert returns[0].tolist() == pytest.approx([-0.1, -0.2, 1 - 0.4], abs=1e-6)
    assert mean_kl == pytest.approx(3.0, abs=1e-5)  # 1 - 2 + 4, whatever the mode


def test_a_reference_without_a_penalty_only_logs(everyone):
    returns, _, mean_kl = returns_of(make_preset(**PLAIN, algorithm__reference=True), with_kl(everyone, [1.0, 1.0, 1.0]))
    assert returns[:, 0].tolist() == REWARDS.tolist()
    assert mean_kl == pytest.approx(3.0, abs=1e-5)


def test_the_adaptive_controller_acts_after_the_epoch(everyone):
    preset = make_preset(
        **PLAIN, algorithm__gamma=0, algorithm__kl_penalty="kl", algorithm__kl_penalty_coef=1.0, algorithm__init_kl_coef=0.2,
        algorithm__kl_target=1.0, algorithm__kl_horizon=8,
    )  # fmt: skip
    algorithm = algorithms.make(dataclasses.replace(preset, algorithm=dataclasses.replace(preset.algorithm, name="ddpo")))
    far = with_kl(everyone, [1.0, 1.0, 1.0])
    credit = algorithm.credit(far, REWARDS)
    assert credit.returns[0, 0].item() == pytest.approx(-0.2, abs=1e-6)
    algorithm.after_epoch(credit)
    beta = 0.2 * (1 + 0.2 * 4 / 8)
    assert algorithm.credit(far, REWARDS).returns[0, 0].item() == pytest.approx(-beta, abs=1e-6)


# --- advantages -------------------------------------------------------------------------------------------------------
def test_ddpo_credits_every_step_with_the_whole_normalised_reward(everyone):
    credit = algorithms.make(make_preset(algorithm__name="ddpo", reward__normalise="global")).credit(everyone, REWARDS)
    expected = (REWARDS.double() - 3) / (REWARDS.double().std() + 1e-8)
    assert credit.advantages.allclose(expected.unsqueeze(1).expand(4, 3), atol=1e-12)


def test_tdpo_subtracts_what_the_critic_expected(everyone):
    credit = algorithms.make(make_preset(**PLAIN, algorithm__name="tdpo")).credit(everyone, REWARDS)
    assert credit.advantages.equal(REWARDS.double().unsqueeze(1) - everyone.values)
    assert credit.returns[:, 0].tolist() == REWARDS.tolist()


def test_global_normalisation_of_advantages_spans_samples_and_steps(everyone):
    credit = algorithms.make(make_preset(reward__normalise="none")).credit(everyone, REWARDS)
    raw = REWARDS.double().numpy()[:, None] - everyone.values.double().numpy()
    assert credit.advantages.numpy() == pytest.approx((raw - raw.mean()) / (raw.std() + 1e-8), abs=1e-12)


def test_advantages_per_prompt(everyone):
    preset = make_preset(reward__normalise="none", algorithm__advantage_norm="per-prompt", reward__min_count=2)
    credit = algorithms.make(preset).credit(everyone, REWARDS)
    a = REWARDS.double().numpy()[[0, 2], None] - everyone.values.double().numpy()[[0, 2]]
    assert credit.advantages[[0, 2]].numpy() == pytest.approx((a - a.mean()) / (a.std() + 1e-6), abs=1e-12)


@pytest.mark.parametrize("name", ["ddpo", "tdpo", "tdpo-r"])
def test_an_algorithm_goes_on_after_a_round_trip(name, everyone):
    preset = make_preset(algorithm__name=name, algorithm__advantage_norm="per-prompt", reward__min_count=1)
    straight, resumed = algorithms.make(preset), algorithms.make(preset)
    straight.credit(everyone, REWARDS)
    resumed.load_state_dict(straight.state_dict())
    more = REWARDS.flip(0)
    assert resumed.credit(everyone, more).advantages.equal(straight.credit(everyone, more).advantages)
