"""KL shaping of the rewards against the initial policy, and the controller of its strength (Ziegler et al. 2019, section 2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _js(p: Tensor, q: Tensor) -> Tensor:
    # ln m from the two log-probs, without leaving the log domain
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p - m).clamp(min=0) + (q - m).clamp(min=0)) / 2


# estimators of the KL from log p and log p_ref (means over latent elements); Schulman, http://joschu.net/blog/kl-approx.html
PENALTIES = {
    "kl": lambda p, q: p - q,
    "abs": lambda p, q: (p - q).abs(),
    "square": lambda p, q: (p - q) ** 2 / 2,
    "clip": lambda p, q: (p - q).clamp(min=0),
    "approx": lambda p, q: (p - q).exp() - 1 - (p - q),
    "js": _js,
}


def penalty(mode: str, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The penalty of every step. [N,T] -> [N,T]"""
    return PENALTIES[mode](log_probs, ref_log_probs)


def mean_kl(log_probs: Tensor, ref_log_probs: Tensor) -> float:
    """Mean over samples of the sum over steps of log p - log p_ref, whatever the penalty's mode."""
    return (log_probs - ref_log_probs).sum(dim=1).mean().item()


class FixedController:
    """beta stays."""

    def __init__(self, beta: float):
        self.beta = beta

    def update(self, mean_kl: float, samples: int) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


class AdaptiveController(FixedController):
    """beta grows while the KL is above its target and shrinks while it is below, by at most 20 % per `horizon` samples."""

    def __init__(self, beta: float, target: float, horizon: int):
        super().__init__(beta)
        self.target = target
        self.horizon = horizon

    def update(self, mean_kl: float, samples: int) -> None:
        error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * samples / self.horizon


def controller(beta: float, target: float | None, horizon: int) -> FixedController:
    return FixedController(beta) if target is None else AdaptiveController(beta, target, horizon)
