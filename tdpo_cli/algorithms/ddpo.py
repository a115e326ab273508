"""DDPO (Black et al. 2023, https://arxiv.org/abs/2305.13301): every step earns the whole normalised reward; no critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tdpo_cli.algorithms.base import Algorithm
from tdpo_cli.algorithms.returns import Returns
from tdpo_cli.config.settings import Preset
from tdpo_cli.types import Credit, Trajectory


class DDPO(Algorithm):
    def __init__(self, preset: Preset):
        self.returns = Returns(preset)

    def normalise(self, prompt_keys: Sequence[str], rewards: Tensor, name: str | None = None) -> Tensor:
        return self.returns.normalise(prompt_keys, rewards, name)

    def share_out(self, everyone: Trajectory, normed: Tensor) -> Credit:
        returns, mean_kl = self.returns(everyone, normed)
        return Credit(advantages=returns, returns=returns, normed_rewards=normed, mean_kl=mean_kl)

    def after_epoch(self, credit: Credit) -> None:
        self.returns.after_epoch(credit.mean_kl, len(credit.returns))

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self.returns.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns.load_state_dict(state["returns"])
