"""Paired, interleaved timings: every round runs every candidate once, in turning order; ratios are of the same round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from setup import Bench

CLOCKS = ("wall_time", "cpu_time")
Phases = dict[str, tuple[float, float]]  # name -> seconds of wall time, of CPU time of this process


def clock_of(bench: Bench) -> int:
    """Which clock ratios are quoted by: wall time beside a GPU; on a CPU, which others may share, the CPU time of this process."""
    return 0 if bench.device.type == "cuda" else 1


class Stopwatch:
    """`with watch("sampling"): ...` adds up; waits for the device before and after."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize, self.phases = synchronize, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.synchronize()
        before = self.phases.get(name, (0.0, 0.0))
        self.phases[name] = before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu


def interleave(candidates: dict[str, Callable[[], Phases]], rounds: int) -> dict[str, list[Phases]]:
    """Run all candidates `rounds` times; the order turns by one each round."""
    names, seen = list(candidates), {name: [] for name in candidates}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            seen[name].append(candidates[name]())
    return seen


def seconds(rounds: list[Phases], phase: str, clock: int) -> list[float]:
    """Of one phase, or of all (`epoch`), in every round. clock 0 is wall time, 1 CPU time."""
    return [sum(times[clock] for times in one.values()) if phase == "epoch" else one[phase][clock] for one in rounds]


def ratios(slow: list[Phases], fast: list[Phases], phase: str, clock: int) -> list[float]:
    return [a / b for a, b in zip(seconds(slow, phase, clock), seconds(fast, phase, clock), strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """median, smallest and largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
