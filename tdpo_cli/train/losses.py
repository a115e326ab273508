"""The losses of one optimizer step, per (sample, step) pair."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated; and where the clip binds. All [b]."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, pessimistic about moves beyond the clip range (0: no clipping); and where it binds. All [b]."""
    unclipped = (values - returns) ** 2
    if clip_range == 0:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    # the bounds are clamped to, not the difference: a value inside them stays itself to the last bit
    near = values.clamp(old_values - clip_range, old_values + clip_range)
    clipped = (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def approx_kl(log_ratios: Tensor) -> Tensor:
    """Estimate of KL(old, new), http://joschu.net/blog/kl-approx.html (k3): how far the policy moved since the rollout. [b] -> []"""
    return (log_ratios.exp() - 1 - log_ratios).mean()


def total_loss(policy: Tensor, critic: Tensor | None, critic_coef: float) -> Tensor:
    """What the official log calls the loss. The two networks share no weights: each part has its own backward pass, nothing sums them here."""
    return policy if critic is None else policy + critic_coef * critic
