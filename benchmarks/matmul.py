"""How much of the device's measured matrix-product rate the phases reach."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from ours import Bare
from setup import Bench
from timing import Phases, clock_of, seconds
from torch.utils.flop_counter import FlopCounterMode


def rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP per second of a large square product in that type, the best of `repeats`; by CPU time where there is no GPU."""
    gpu = device.type == "cuda"
    n, clock = (8192, time.perf_counter) if gpu else (768, time.process_time)
    wait = torch.cuda.synchronize if gpu else lambda: None
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        wait()
        start = clock()
        a @ a
        wait()
        best = min(best, clock() - start)
    return 2 * n**3 / best


def shares(bench: Bench, bare: Bare, timed: list[Phases]) -> dict[str, Any]:
    """rate, and per phase of the bare calls its FLOP, seconds and share of the rate. Call it after the times were taken: counting is slow."""
    measured, phases = rate(bench.device, bench.policy.family.network.dtype), {}
    for name in ("denoise", "decode", "train"):
        with FlopCounterMode(display=False) as counter:
            getattr(bare, name)()
        spent = statistics.median(seconds(timed, name, clock_of(bench)))
        phases[name] = {"flop": counter.get_total_flops(), "seconds": spent, "share": counter.get_total_flops() / spent / measured}
    return {"flop_per_second": measured, "phases": phases}
