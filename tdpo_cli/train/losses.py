"""The losses of one optimizer step, per (sample, step) pair."""

from __future__ import annotations

import torch
from torch import Tensor

from tdpo_cli.types import Transition


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


def reference_kl(kind: str, transition: Transition, reference: Transition, diffusion: Tensor | None = None) -> Tensor:
    """How far a step is from the reference's, the mean over latent elements. -> [b]

    prediction: squared difference of the networks' predictions. gaussian: KL of the two steps, d^2 / (2 std^2) with d the
    difference of their means. flow-grpo: d^2 / (2 s^2) with s = std without sqrt(-dt), which is `diffusion` [b].
    """
    if kind == "prediction":
        return ((transition.prediction.float() - reference.prediction.float()) ** 2).flatten(1).mean(dim=1)
    if kind == "gaussian":
        return transition.kl(reference)
    return ((transition.mean - reference.mean) ** 2).flatten(1).mean(dim=1) / (2 * diffusion**2)


def guarded_log_ratio(transition: Transition, x_next: Tensor, noise: Tensor) -> Tensor:
    """GRPO-Guard's logarithm of the ratio (arXiv 2510.22319): centred at 0 and of equal spread at every step. -> [b]

    Published as std (log p - log p_old) + mean(d^2) / (2 std), with d = mean - mean_old. As x' = mean_old + std z, that is the
    mean of z d. mean_old is x' - std z, so that only the z of the rollout is needed.
    """
    moved = transition.mean - (x_next - transition.std * noise)
    return (noise * moved).flatten(1).mean(dim=1)


def approx_kl(log_ratios: Tensor) -> Tensor:
    """Estimate of KL(old, new), http://joschu.net/blog/kl-approx.html (k3): how far the policy moved since the rollout. [b] -> []"""
    return (log_ratios.exp() - 1 - log_ratios).mean()


def total_loss(policy: Tensor, critic: Tensor | None, critic_coef: float) -> Tensor:
    """What the official log calls the loss. The two networks share no weights: each part has its own backward pass, nothing sums them here."""
    return policy if critic is None else policy + critic_coef * critic
