"""From raw rewards to discounted returns: normalisation, clipping, KL shaping, discount."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo_cli.algorithms import kl, moments
from tdpo_cli.config.settings import Preset
from tdpo_cli.types import Trajectory


class Returns:
    """Holds the running reward statistics and the KL controller: everything an algorithm remembers about rewards."""

    def __init__(self, preset: Preset):
        reward, algorithm = preset.reward, preset.algorithm
        self.clip_range = reward.clip_range
        self.gamma = algorithm.gamma
        self.penalty_mode, self.penalty_coef = algorithm.kl_penalty, algorithm.kl_penalty_coef
        self._moments = lambda: moments.reward_moments(reward.normalise, reward.buffer_size, reward.min_count, reward.scale_only)
        self.train = reward.train
        self.moments = self._moments()  # of the training reward
        self.more: dict[str, moments.Moments] = {}  # of further rewards that take part in training
        self.controller = kl.controller(algorithm.init_kl_coef, algorithm.kl_target, algorithm.kl_horizon)

    def normalise(self, prompt_keys: Sequence[str], rewards: Tensor, name: str | None = None) -> Tensor:
        """One reward by statistics of its own. rewards [N] -> [N] float64"""
        own = self.moments if name in (None, self.train) else self.more.setdefault(name, self._moments())
        return own.normalise(prompt_keys, rewards)

    def __call__(self, everyone: Trajectory, normed: Tensor) -> tuple[Tensor, float | None]:
        """normed [N] -> (returns [N,T], mean KL); float64"""
        log_probs, ref_log_probs = everyone.log_probs.cpu(), everyone.ref_log_probs
        per_step = torch.zeros(log_probs.shape, dtype=torch.float64)
        mean_kl = None
        if ref_log_probs is not None:
            mean_kl = kl.mean_kl(log_probs, ref_log_probs.cpu())
            if self.penalty_coef > 0:
                # scaled twice, by the controller's beta and by the coefficient: the published options mean that
                per_step += self.penalty_coef * self.kl_shaping(log_probs, ref_log_probs.cpu())
        per_step[:, -1] += self.clipped(normed)
        return discounted(per_step, self.gamma), mean_kl

    def clipped(self, normed: Tensor) -> Tensor:
        """The normalised reward within +- clip_range; 0 is off. [N] -> [N]"""
        return normed.clamp(-self.clip_range, self.clip_range) if self.clip_range > 0 else normed

    def kl_shaping(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        """-beta times the penalty of every step. [N,T] -> [N,T]"""
        return -self.controller.beta * kl.penalty(self.penalty_mode, log_probs, ref_log_probs)

    def after_epoch(self, mean_kl: float | None, samples: int) -> None:
        if mean_kl is not None and self.penalty_coef > 0:
            self.controller.update(mean_kl, samples)

    def state_dict(self) -> dict:
        more = {name: one.state_dict() for name, one in self.more.items()}
        return {"moments": self.moments.state_dict(), "kl": self.controller.state_dict(), **({"more": more} if more else {})}

    def load_state_dict(self, state: dict) -> None:
        self.moments.load_state_dict(state["moments"])
        for name, own in state.get("more", {}).items():
            self.more.setdefault(name, self._moments()).load_state_dict(own)
        self.controller.load_state_dict(state["kl"])


def discounted(per_step: Tensor, gamma: float) -> Tensor:
    """R_k = r_k + gamma R_{k+1}. [N,T] -> [N,T]"""
    returns = per_step.clone()
    for k in range(returns.shape[1] - 2, -1, -1):
        returns[:, k] += gamma * returns[:, k + 1]
    return returns
