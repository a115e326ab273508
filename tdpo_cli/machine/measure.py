"""Measure what a forward and backward pass needs, before the first epoch: at one and at two samples, whatever the network is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Counter(Protocol):
    """Counts the bytes of a device."""

    def held(self) -> int:
        """Bytes that are in use now."""

    def peak_of(self, work: Callable[[], None]) -> int:
        """The most bytes in use at a time while `work` runs."""


class Cuda:
    """PyTorch's own count of what it holds on one GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


@dataclass(frozen=True)
class Need:
    """Bytes of a forward and backward pass: `fixed` once, with all that was held before it, and `each` per sample."""

    fixed: int
    each: int

    def largest(self, room: int, at_most: int) -> int:
        """The largest power of two of samples that fits into `room` bytes, or `at_most`; at least 1."""
        fitting = [2**n for n in range(at_most.bit_length()) if self.fixed + 2**n * self.each <= room]
        if at_most >= 1 and self.fixed + at_most * self.each <= room:
            fitting.append(at_most)
        return max(fitting, default=1)


def measure(work: Callable[[int], None], counter: Counter) -> Need:
    """Run `work` with one sample and with two. The first call of all, with one, is not counted: libraries reserve their workspace in it."""
    work(1)
    one, two = (counter.peak_of(lambda rows=rows: work(rows)) for rows in (1, 2))
    each = max(0, two - one)
    return Need(max(0, one - each), each)
