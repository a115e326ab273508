"""Facts about the running statistics of rewards and advantages."""

import numpy as np
import pytest
import torch

from tdpo_cli.algorithms.moments import GlobalMoments, NoMoments, PerPromptMoments, reward_moments


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# --- per prompt -------------------------------------------------------------------------------------------------------
def test_each_prompt_is_standardised_by_its_own_rewards():
    normed = PerPromptMoments(buffer_size=8, min_count=2).normalise(["a", "b", "a", "b"], column(1, 10, 3, 30))
    # a: mean 2, population std 1; b: mean 20, std 10
    assert normed.tolist() == pytest.approx([-1 / (1 + 1e-6), -10 / (10 + 1e-6), 1 / (1 + 1e-6), 10 / (10 + 1e-6)], abs=1e-12)


def test_a_prompt_below_min_count_uses_the_whole_epoch_of_all_prompts():
    normed = PerPromptMoments(buffer_size=8, min_count=3).normalise(["a", "a", "a", "b"], column(0, 3, 6, 1))
    a_std, epoch_std = np.std([0, 3, 6]), np.std([0, 3, 6, 1])
    assert normed[:3].tolist() == pytest.approx([-3 / (a_std + 1e-6), 0, 3 / (a_std + 1e-6)])
    assert normed[3].item() == pytest.approx((1 - 2.5) / (epoch_std + 1e-6))


def test_min_count_itself_is_enough():
    normed = PerPromptMoments(buffer_size=8, min_count=2).normalise(["a", "a", "b"], column(0, 2, 100))
    assert normed[:2].tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_the_fallback_forgets_earlier_epochs():
    moments = PerPromptMoments(buffer_size=8, min_count=16)
    moments.normalise(["a", "a"], column(1000, 2000))
    assert moments.normalise(["a", "b"], column(0, 2)).tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_earlier_epochs_of_a_prompt_count_as_long_as_the_buffer_holds_them():
    moments = PerPromptMoments(buffer_size=3, min_count=1)
    moments.normalise(["a", "a"], column(100, 1))
    # now {100, 1, 4}: nothing dropped yet
    assert moments.normalise(["a"], column(4)).item() == pytest.approx((4 - 35) / (np.std([100, 1, 4]) + 1e-6))
    # the oldest, 100, is dropped: {1, 4, 7}
    assert moments.normalise(["a"], column(7)).item() == pytest.approx((7 - 4) / (np.std([1, 4, 7]) + 1e-6))


def test_more_rewards_in_one_epoch_than_the_buffer_holds_keep_the_last():
    normed = PerPromptMoments(buffer_size=2, min_count=1).normalise(["a"] * 3, column(50, 2, 4))
    assert normed.tolist() == pytest.approx([(50 - 3) / (1 + 1e-6), -1 / (1 + 1e-6), 1 / (1 + 1e-6)])


def test_scale_only_does_not_subtract_the_mean():
    normed = PerPromptMoments(buffer_size=8, min_count=2, scale_only=True).normalise(["a", "a"], column(1, 3))
    assert normed.tolist() == pytest.approx([1 / (1 + 1e-6), 3 / (1 + 1e-6)])


def test_equal_rewards_become_zero_not_nan():
    assert PerPromptMoments(8, 1).normalise(["a", "a"], column(5, 5)).tolist() == [0, 0]


def test_single_precision_rewards_are_standardised_in_double():
    assert PerPromptMoments(8, 1).normalise(["a", "a"], torch.tensor([1.0, 2.0])).dtype == torch.float64


# --- global -----------------------------------------------------------------------------------------------------------
def test_global_moments_equal_numpy_over_all_rewards_so_far():
    draw = np.random.default_rng(0)
    moments, seen = GlobalMoments(), np.empty(0)
    for size in (7, 1, 20):
        rewards = draw.normal(3, 2, size)
        seen = np.concatenate([seen, rewards])
        normed = moments.normalise(["a"] * size, torch.from_numpy(rewards))
        # this epoch's rewards are counted before they are standardised; n - 1
        assert normed.numpy() == pytest.approx((rewards - seen.mean()) / (seen.std(ddof=1) + 1e-8), abs=1e-12)


def test_global_scale_only_divides_by_the_same_std():
    rewards = column(2, 4, 9)
    assert GlobalMoments(scale_only=True).normalise(["a"] * 3, rewards).tolist() == pytest.approx(
        (rewards.numpy() / (np.std([2, 4, 9], ddof=1) + 1e-8)).tolist()
    )


def test_no_moments_change_nothing():
    assert NoMoments().normalise(["a"], torch.tensor([2.5])).tolist() == [2.5]


@pytest.mark.parametrize("kind, cls", [("per-prompt", PerPromptMoments), ("global", GlobalMoments), ("none", NoMoments)])
def test_preset_words_choose_the_statistics(kind, cls):
    assert type(reward_moments(kind, 8, 2, True)) is cls


# --- advantages -------------------------------------------------------------------------------------------------------
def test_advantages_of_a_prompt_are_standardised_over_samples_and_steps():
    advantages = torch.tensor([[1.0, 3.0], [0.0, 10.0], [5.0, 7.0]], dtype=torch.float64)
    normed = PerPromptMoments(buffer_size=8, min_count=2).normalise(["a", "b", "a"], advantages)
    a, everything = [1, 3, 5, 7], advantages.numpy()
    assert normed[[0, 2]].flatten().tolist() == pytest.approx(((np.array(a) - 4) / (np.std(a) + 1e-6)).tolist())
    # one sample of b is below min_count: samples are counted, not steps
    assert normed[1].tolist() == pytest.approx(((everything[1] - everything.mean()) / (everything.std() + 1e-6)).tolist())


def test_advantages_beyond_the_buffer_are_dropped_by_sample():
    moments = PerPromptMoments(buffer_size=2, min_count=1)
    moments.normalise(["a"], torch.tensor([[1000.0, 2000.0]], dtype=torch.float64))
    normed = moments.normalise(["a", "a"], torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64))
    assert normed.flatten().tolist() == pytest.approx(((np.arange(4) - 1.5) / (np.std(np.arange(4)) + 1e-6)).tolist())


# --- resuming ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [lambda: PerPromptMoments(3, 1), GlobalMoments, NoMoments])
def test_reward_statistics_go_on_after_a_round_trip(make):
    straight, resumed = make(), make()
    straight.normalise(["a", "b", "a"], column(1, 5, 2))
    resumed.load_state_dict(straight.state_dict())
    for rewards in (column(4, 9, 3), column(0, 1, 8)):
        assert resumed.normalise(["a", "a", "b"], rewards).equal(straight.normalise(["a", "a", "b"], rewards))


def test_a_saved_state_does_not_move_with_its_owner():
    moments = PerPromptMoments(3, 1)
    moments.normalise(["a"], column(1))
    saved = moments.state_dict()
    moments.normalise(["a"], column(2))
    assert saved == {"recent": {"a": [1.0]}}


def test_advantage_statistics_go_on_after_a_round_trip():
    straight, resumed = PerPromptMoments(2, 1), PerPromptMoments(2, 1)
    straight.normalise(["a"], torch.tensor([[1.0, 5.0]], dtype=torch.float64))
    resumed.load_state_dict(straight.state_dict())
    more = torch.tensor([[2.0, 9.0]], dtype=torch.float64)
    assert resumed.normalise(["a"], more).equal(straight.normalise(["a"], more))
