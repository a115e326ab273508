"""Facts about the losses of one optimizer step."""

import math

import pytest
import torch

from tdpo_cli.train.losses import approx_kl, critic_loss, guarded_log_ratio, policy_loss, reference_kl, total_loss
from tdpo_cli.types import Transition

# ratio, advantage, clip range -> loss, clipped: -min(A r, A clip(r)) by hand
POLICY_TABLE = [
    (1.00, 2.0, 0.1, -2.0, False),
    (1.05, 2.0, 0.1, -2.1, False),  # inside the range the ratio counts
    (1.30, 2.0, 0.1, -2.2, True),  # a good step that already became likelier: no more credit
    (0.70, 2.0, 0.1, -1.4, False),  # a good step that became less likely: full pull back
    (0.70, -2.0, 0.1, 1.8, True),  # a bad step that already became less likely
    (1.30, -2.0, 0.1, 2.6, False),  # a bad step that became likelier: full push
    (1.30, 0.0, 0.1, 0.0, False),
]


@pytest.mark.parametrize("ratio, advantage, clip_range, loss, clipped", POLICY_TABLE)
def test_policy_loss_by_hand(ratio, advantage, clip_range, loss, clipped):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    losses, binds = policy_loss(ratio, torch.tensor([advantage], dtype=torch.float64), clip_range)
    assert losses.item() == pytest.approx(loss)
    assert binds.item() is clipped
    losses.sum().backward()
    assert ratio.grad.item() == pytest.approx(0 if clipped else -advantage)


# value, old value, return, clip range -> loss, clipped
CRITIC_TABLE = [
    (1.0, 1.0, 3.0, 0.2, 2.0, False),
    (1.1, 1.0, 3.0, 0.2, 0.5 * 1.9**2, False),
    (2.0, 1.0, 3.0, 0.2, 0.5 * 1.8**2, True),  # moved past the range towards the return: clipped at 1.2
    (0.0, 1.0, 3.0, 0.2, 0.5 * 3.0**2, False),  # moved away: the worse of both is its own
    (4.0, 1.0, 3.0, 0.2, 0.5 * 1.8**2, True),  # overshot, but less than the clipped value lags
    (2.0, 1.0, 3.0, 0.0, 0.5, False),  # 0: no clipping
]


@pytest.mark.parametrize("value, old_value, target, clip_range, loss, clipped", CRITIC_TABLE)
def test_critic_loss_by_hand(value, old_value, target, clip_range, loss, clipped):
    column = lambda x: torch.tensor([x], dtype=torch.float64)
    losses, binds = critic_loss(column(value), column(old_value), column(target), clip_range)
    assert losses.item() == pytest.approx(loss)
    assert binds.item() is clipped


def test_approx_kl_by_hand():
    log_ratios = torch.tensor([0.0, 0.5, -0.5])
    expected = (0 + (math.exp(0.5) - 1.5) + (math.exp(-0.5) - 0.5)) / 3
    assert approx_kl(log_ratios).item() == pytest.approx(expected, rel=1e-5)


def test_total_loss_weighs_the_critic():
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5).item() == 3.5
    assert total_loss(torch.tensor(2.0), None, 0.5).item() == 2.0


# --- the KL term, the guarded ratio ---------------------------------------------------------------------------------------
def step(mean, prediction, std=0.5):
    return Transition(torch.tensor([mean]), torch.full((1, 1), std), torch.zeros(1, 2), torch.tensor([prediction]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("prediction", (3**2 + 1**2) / 2),
        ("gaussian", (1**2 + 2**2) / 2 / (2 * 0.5**2)),
        ("flow-grpo", (1**2 + 2**2) / 2 / (2 * 0.8**2)),
    ],
)
def test_kl_term_by_hand(kind, expected):
    ours, reference = step([1.0, 2.0], [3.0, 0.0]), step([0.0, 0.0], [0.0, 1.0])
    assert reference_kl(kind, ours, reference, torch.tensor([0.8])).tolist() == pytest.approx([expected])
    assert reference_kl(kind, ours, ours, torch.tensor([0.8])).item() == 0


def test_guarded_ratio_is_the_published_formula():
    """std (log p - log p_old) + mean(d^2) / (2 std), on numbers of a usual step."""
    draw = torch.Generator().manual_seed(0)
    old, moved, noise = (torch.randn(4, 3, 2, 2, generator=draw, dtype=torch.float64) for _ in range(3))
    std = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    before, now = Transition(old, std, old), Transition(old + 1e-2 * moved, std, old)
    x_next = before.sample(noise)
    published = std.flatten() * (now.log_prob(x_next) - before.log_prob(x_next)) + (1e-2 * moved).square().flatten(1).mean(1) / (2 * std.flatten())
    assert torch.allclose(guarded_log_ratio(now, x_next, noise), published, rtol=1e-10, atol=0)
    assert guarded_log_ratio(before, x_next, noise).abs().max() < 1e-15
