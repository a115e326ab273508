"""GRPO on denoising steps (Flow-GRPO, Liu et al. 2025, https://arxiv.org/abs/2505.05470): images of one prompt are judged against each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo_cli.algorithms import kl
from tdpo_cli.algorithms.base import Algorithm
from tdpo_cli.config.settings import Preset
from tdpo_cli.types import Credit, Trajectory

EPS = 1e-4  # added to the standard deviation; Flow-GRPO's


class GRPO(Algorithm):
    """Every step of a sample has the same advantage. Nothing is remembered from epoch to epoch."""

    def __init__(self, preset: Preset):
        self.settings = preset.algorithm

    def normalise(self, prompt_keys: Sequence[str], rewards: Tensor, name: str | None = None) -> Tensor:
        """The advantage in its group."""
        return group_advantages(prompt_keys, rewards, self.settings.advantage_std)

    def share_out(self, everyone: Trajectory, normed: Tensor) -> Credit:
        clip, steps = self.settings.advantage_clip, everyone.log_probs.shape[1]
        clipped = normed.clamp(-clip, clip) if clip > 0 else normed
        wide = lambda values: values.unsqueeze(1).expand(-1, steps).contiguous()
        mean_kl = None if everyone.ref_log_probs is None else kl.mean_kl(everyone.log_probs.cpu(), everyone.ref_log_probs.cpu())
        return Credit(advantages=wide(clipped), returns=wide(normed), normed_rewards=normed, mean_kl=mean_kl)


def group_advantages(prompt_keys: Sequence[str], rewards: Tensor, std: str) -> Tensor:
    """(r - mean of the prompt) / (S + 1e-4). [N] -> [N]

    S is the standard deviation of the prompt (`group`) or of all (`epoch`); with `none` nothing is divided.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(prompt_keys):
        groups[key].append(row)
    rewards = rewards.double()
    advantages, spread = torch.zeros_like(rewards), rewards.std(correction=0)
    for rows in groups.values():
        own = rewards[rows]
        if own.min() == own.max():  # exactly 0: the mean of equal numbers may be off by rounding
            continue
        scale = 1.0 if std == "none" else (own.std(correction=0) if std == "group" else spread) + EPS
        advantages[rows] = (own - own.mean()) / scale
    return advantages
