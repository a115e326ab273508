"""TDPO and TDPO-R (Zhang et al. 2024, https://arxiv.org/abs/2402.08552): a critic gives every step its own advantage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.algorithms import reset
from tdpo_cli.algorithms.base import Algorithm
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.algorithms.moments import PerPromptMoments
from tdpo_cli.algorithms.returns import Returns
from tdpo_cli.config.settings import Preset
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Credit, ShufflePlan, Trajectory


class TDPO(Algorithm):
    """Temporal advantages: what a sample returned minus what the critic expected of its half-made image."""

    def __init__(self, preset: Preset):
        self.settings = preset.algorithm
        self.returns = Returns(preset)
        self.advantage_moments = PerPromptMoments(preset.reward.buffer_size, preset.reward.min_count)
        self.dormant: list[Tensor] | None = None  # the last census' masks
        self.last_census: reset.Census | None = None

    def normalise(self, prompt_keys: Sequence[str], rewards: Tensor, name: str | None = None) -> Tensor:
        return self.returns.normalise(prompt_keys, rewards, name)

    def share_out(self, everyone: Trajectory, normed: Tensor) -> Credit:
        returns, mean_kl = self.returns(everyone, normed)
        advantages = returns - everyone.values.cpu()
        if self.settings.advantage_norm == "global":
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        elif self.settings.advantage_norm == "per-prompt":
            advantages = self.advantage_moments.normalise(everyone.prompt_keys, advantages)
        return Credit(advantages=advantages, returns=returns, normed_rewards=normed, mean_kl=mean_kl)

    def reset_target(self, epoch: int) -> str:
        """Which neurons become new after this epoch's inner epochs."""
        return "none"

    def after_inner_epoch(
        self, critic: Critic, optimizer: torch.optim.Optimizer, everyone: Trajectory,
        plan: ShufflePlan, inner: int, randomness: Randomness,
    ) -> dict[str, Any]:  # fmt: skip
        """Count the dormant neurons on the last trained slot of the first rows; re-initialise those of the target."""
        rows = slice(0, self.settings.neuron_rows)
        embeds = everyone.image_embeds[plan.sample_index[rows, -1], plan.step_index[rows, -1]]
        census = reset.census(critic, embeds.to(critic.layers[0].weight), self.settings.dormant_threshold, self.dormant)
        self.dormant, self.last_census = census.dormant, census
        chosen = [reset.TARGETS[self.reset_target(everyone.epoch)](mask) for mask in census.dormant]
        count = reset.reinitialise(critic, optimizer, chosen, randomness.reset(everyone.epoch, inner))
        extra = self.settings.extra_dormant_threshold
        return {
            "dormant_fraction": census.dormant_count / census.total,
            "dormant_overlap": census.overlap,
            "dormant_fraction_extra": None if extra is None else census.dormant_at(extra) / census.total,
            "reset": count,
        }

    def after_epoch(self, credit: Credit) -> None:
        self.returns.after_epoch(credit.mean_kl, len(credit.returns))

    def state_dict(self) -> dict[str, Any]:
        return {
            "returns": self.returns.state_dict(),
            "advantage_moments": self.advantage_moments.state_dict(),
            "dormant": self.dormant,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns.load_state_dict(state["returns"])
        self.advantage_moments.load_state_dict(state["advantage_moments"])
        self.dormant = state["dormant"]


class TDPOR(TDPO):
    """TDPO with Reset: every few epochs the critic's active neurons are made new, against primacy bias."""

    def reset_target(self, epoch: int) -> str:
        return self.settings.reset_target if (epoch + 1) % self.settings.reset_every == 0 else "none"
