"""The moving average of the trained weights: what checkpoints hold and previews show while training goes on with the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Average:
    """average += (1 - d)(weights - average) with d = min((1 + s) / (10 + s), decay), s the optimizer steps before this one."""

    def __init__(self, weights: Sequence[Tensor], decay: float, every: int):
        self.weights, self.decay, self.every = list(weights), decay, every
        self.values = [weight.detach().clone() for weight in self.weights]
        self.steps = 0  # of the optimizer, over the whole run

    def update(self) -> None:
        """Called after every optimizer step."""
        self.apply(self.steps)
        self.steps += 1

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Move the average after optimizer step `step`, counted from 0, if that is an `every`-th one."""
        if (step + 1) % self.every:
            return
        decay = min((1 + step) / (10 + step), self.decay)
        for value, weight in zip(self.values, self.weights, strict=True):
            value.add_(weight - value, alpha=1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network computes with the average; afterwards its weights are what they were, to the last bit."""
        kept = [weight.detach().clone() for weight in self.weights]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def distance(self) -> float:
        """How far the average is from the weights, in units of the weights' norm."""
        apart = sum((weight - value).double().square().sum() for value, weight in zip(self.values, self.weights, strict=True))
        size = sum(weight.double().square().sum() for weight in self.weights)
        return (apart / size).sqrt().item()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": [value.cpu().clone() for value in self.values], "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
        self.steps = state["steps"]
