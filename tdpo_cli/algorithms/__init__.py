"""Algorithms: what an epoch's rewards are worth to each step, and what happens to the critic after an inner epoch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tdpo_cli.algorithms.ddpo import DDPO
from tdpo_cli.algorithms.tdpo import TDPO, TDPOR
from tdpo_cli.critic import Critic
from tdpo_cli.preset import Preset
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Credit, ShufflePlan, Trajectory


class Algorithm(Protocol):
    """`everyone` holds all samples of the epoch, ordered by sample id; the mathematics is single-process."""

    def credit(self, everyone: Trajectory, rewards: Tensor) -> Credit: ...
    def after_inner_epoch(
        self, critic: Critic | None, optimizer: torch.optim.Optimizer | None, everyone: Trajectory,
        plan: ShufflePlan, inner: int, randomness: Randomness,
    ) -> dict[str, Any]: ...  # fmt: skip
    def after_epoch(self, credit: Credit) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


ALGORITHMS = {"ddpo": DDPO, "tdpo": TDPO, "tdpo-r": TDPOR}


def make(preset: Preset) -> Algorithm:
    return ALGORITHMS[preset.algorithm.name](preset)
