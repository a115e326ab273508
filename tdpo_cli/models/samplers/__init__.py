"""Schedules and the Gaussian step of each kind of diffusion.

One equation serves every sampler: mean = s' x0 + c eps and x' = mean + std z, where x0 is the predicted clean image, eps the
predicted noise, s' the signal of the state that the step goes to. The samplers differ in (s', c, std) only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tdpo_cli.types import Transition


class Sampler(Protocol):
    """The T steps from noise to image. All tensors are on one device."""

    timesteps: Tensor  # [T] what the network is given at each step
    stochastic: Tensor  # [T] bool: these steps have a log-probability and can be trained

    def step(self, prediction: Tensor, x_t: Tensor, k: Tensor) -> Transition:
        """The transition of step k, in fp32. prediction, x_t [b,...]; k [b] int64."""

    def to(self, device: torch.device | str) -> Sampler: ...

    def check_trainable(self) -> None:
        """Raise RequestError if a policy gradient could not use these steps."""


def gaussian(x0: Tensor, eps: Tensor, signal: Tensor, coefficient: Tensor, std: Tensor) -> Transition:
    """The step to a state with that signal: mean = signal x0 + coefficient eps. x0, eps [b,...]; the others [b,1,...]."""
    return Transition(mean=signal * x0 + coefficient * eps, std=std, x0=x0)


def column(values: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """Each row's entry of a per-step table, ready to multiply with `like`. values [T], k [b], like [b,...] -> [b,1,...]"""
    return values[k].view(-1, *[1] * (like.ndim - 1))
