"""Running mean and standard deviation of rewards (per prompt or global) and of advantages (per prompt)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor


class NoMoments:
    """Rewards stay as they are."""

    def normalise(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        return rewards.double()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class PerPromptMoments:
    """Each prompt remembers its last `buffer_size` samples (Black et al. 2023, section 4.3): their rewards, or their advantages of all steps."""

    def __init__(self, buffer_size: int, min_count: int, scale_only: bool = False, eps: float = 1e-6):
        self.buffer_size, self.min_count, self.scale_only, self.eps = buffer_size, min_count, scale_only, eps
        self.recent: dict[str, deque] = {}

    def normalise(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """(v - mean) / (std + eps) over the prompt's recent samples, this epoch's included. [N] or [N,T] -> the same, float64

        A prompt with fewer than `min_count` samples takes mean and std of the whole epoch instead.
        """
        values = values.double()
        out = torch.empty_like(values)
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows_of[prompt].append(row)
        for prompt, rows in rows_of.items():
            recent = self.recent.setdefault(prompt, deque(maxlen=self.buffer_size))
            recent.extend(values[rows].tolist())
            known = torch.tensor(list(recent), dtype=torch.float64) if len(recent) >= self.min_count else values
            centre = 0.0 if self.scale_only else known.mean()
            out[rows] = (values[rows] - centre) / (known.std(correction=0) + self.eps)
        return out

    def state_dict(self) -> dict:
        return {"recent": {prompt: list(samples) for prompt, samples in self.recent.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.recent = {prompt: deque(samples, maxlen=self.buffer_size) for prompt, samples in state["recent"].items()}


class GlobalMoments:
    """Mean and variance of all rewards so far (Chan et al. 1979, parallel update)."""

    def __init__(self, scale_only: bool = False, eps: float = 1e-8):
        self.scale_only, self.eps = scale_only, eps
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-24

    def normalise(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """(r - mean) / (std + eps) with the statistics that already hold this epoch. rewards [N] -> [N] float64"""
        rewards = rewards.double()
        self._add(rewards)
        centre = 0.0 if self.scale_only else self.mean
        return (rewards - centre) / (self.std + self.eps)

    @property
    def std(self) -> float:
        """Of a sample: n - 1 in the denominator."""
        return (self.variance * self.count / (self.count - 1)) ** 0.5 if self.count > 1 else self.variance**0.5

    def _add(self, rewards: Tensor) -> None:
        n = len(rewards)
        mean, variance = rewards.mean().item(), rewards.var(correction=0).item()
        delta, total = mean - self.mean, self.count + n
        squares = self.variance * self.count + variance * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.variance, self.count = squares / total, total

    def state_dict(self) -> dict:
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]


Moments = NoMoments | PerPromptMoments | GlobalMoments


def reward_moments(kind: str, buffer_size: int, min_count: int, scale_only: bool) -> Moments:
    if kind == "per-prompt":
        return PerPromptMoments(buffer_size, min_count, scale_only)
    return GlobalMoments(scale_only) if kind == "global" else NoMoments()
