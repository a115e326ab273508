"""The arms of the study, and the one rule by which each gets its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EPOCHS = 60
SEEDS = (1, 2, 3, 4, 5)
PILOT_EPOCHS = 30
PILOT_SEED = 101  # used for nothing else
GRID = (7.5e-4, 1.5e-3, 3e-3, 6e-3)  # learning rates that every method tries once
HEALTHY = 1e-2  # approx_kl of an epoch above which a policy is breaking, not learning

METHODS: dict[str, dict[str, Any]] = {
    "ddpo": {"algorithm.name": "ddpo"},  # as many optimizer steps as TDPO
    "ddpo-all-timesteps": {"algorithm.name": "ddpo", "algorithm.update_mode": "all-timesteps"},  # as its authors: 2 an epoch
    "tdpo": {"algorithm.name": "tdpo"},
    "tdpo-r": {"algorithm.name": "tdpo-r"},
}

# Variants of one method, at that method's learning rate.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # which neurons are reset, beside tdpo (none) and tdpo-r (the active ones: here all but 0 to 43 of 1,232)
    "reset-all": ("tdpo-r", {"algorithm.reset_target": "all"}),
    "reset-dormant": ("tdpo-r", {"algorithm.reset_target": "dormant"}),
    # how often
    "reset-every-2": ("tdpo-r", {"algorithm.reset_every": 2}),
    "reset-every-5": ("tdpo-r", {"algorithm.reset_every": 5}),
    "reset-every-20": ("tdpo-r", {"algorithm.reset_every": 20}),
    # a critic that could matter more
    "tdpo-relu": ("tdpo", {"algorithm.critic_activation": "relu"}),
    "tdpo-r-relu": ("tdpo-r", {"algorithm.critic_activation": "relu"}),
    "tdpo-4-critic-steps": ("tdpo", {"algorithm.critic_steps": 4}),
    "tdpo-r-4-critic-steps": ("tdpo-r", {"algorithm.critic_steps": 4}),
}


def method_of(arm: str) -> str:
    """The method whose learning rate an arm uses."""
    return arm if arm in METHODS else VARIANTS[arm][0]


def overrides(arm: str) -> dict[str, Any]:
    """section.key -> value, without the learning rate."""
    if arm in METHODS:
        return METHODS[arm]
    method, changes = VARIANTS[arm]
    return METHODS[method] | changes


def best_rate(proxy: Mapping[float, float], worst_kl: Mapping[float, float]) -> float:
    """The rule, the same for every method: of the rates whose approx_kl stayed HEALTHY, the one with the highest trained reward.

    proxy: learning rate -> the pilot's mean trained reward over its last fifth; worst_kl: -> its largest approx_kl. Gold is not read.
    """
    healthy = [rate for rate in proxy if worst_kl[rate] <= HEALTHY]
    return max(healthy, key=lambda rate: proxy[rate])
