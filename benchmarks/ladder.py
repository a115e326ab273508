"""The ablation ladder: the official ways are left one after another, each gain on its own line."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import ours
import standin
import torch
from setup import Bench
from timing import Phases, Stopwatch, clock_of, interleave, seconds

from tdpo_cli.machine.memory import Plan


def standin_epoch(bench: Bench, ways: standin.Ways) -> Phases:
    watch = Stopwatch(bench.synchronize)
    bench.restart()
    standin.attention(bench, ways.materialised_attention)
    with watch("sampling"):
        trajectory = standin.sample(bench, ways)
    with watch("scoring"):
        scores = ours.score(bench, trajectory)
    with watch("training"):
        standin.train(bench, ways, trajectory, ours.credit(bench, trajectory, scores), ours.order(bench))
    standin.attention(bench, False)
    return watch.phases


def our_epoch(bench: Bench, plan: Plan) -> Phases:
    watch = Stopwatch(bench.synchronize)
    bench.restart()
    with watch("sampling"):
        trajectory = ours.sample(bench, plan)
    with watch("scoring"):
        scores = ours.score(bench, trajectory)
    with watch("training"):
        ours.train(bench, plan, trajectory, ours.credit(bench, trajectory, scores), ours.order(bench))
    return watch.phases


def in_memory_format(bench: Bench, plan: Plan, memory_format: torch.memory_format) -> Phases:
    """Our epoch with the convolutions' weights in that order; back as it was afterwards."""
    before = torch.channels_last if bench.device.type == "cuda" else torch.contiguous_format
    for network in (bench.policy.family.network, bench.policy.family.pipeline.vae):
        network.to(memory_format=memory_format)
    phases = our_epoch(bench, plan)
    for network in (bench.policy.family.network, bench.policy.family.pipeline.vae):
        network.to(memory_format=before)
    return phases


def rungs(bench: Bench, plan: Plan) -> dict[str, Callable[[], Phases]]:
    """From the official ways to tdpo's, each rung with all the gains before it."""
    ways = dataclasses.replace(standin.OFFICIAL, materialised_attention=True)
    steps = [("official ways, materialised attention", ways)]
    for name, change in (
        ("SDPA", {"materialised_attention": False}),
        ("decode after the loop", {"deferred_look": True}),
        ("preprocessing on the device", {"device_pixels": True}),
        ("coefficients on the device", {"cpu_coefficients": False}),
        ("larger sampling batch and chunks", {"sample_batch": plan.sample_batch, "chunk": plan.decode_chunk}),
        ("micro-batch 4", {"micro_batch": 4}),
        (f"micro-batch {min(plan.micro_batch, bench.size.batch)}", {"micro_batch": plan.micro_batch}),
    ):
        ways = dataclasses.replace(ways, **change)
        steps.append((name, ways))
    table = {name: (lambda ways=ways: standin_epoch(bench, ways)) for name, ways in steps}
    table["tdpo (one critic pass per step, one exchange)"] = lambda: our_epoch(bench, plan)
    usual, other = ("channels_last", "contiguous") if bench.device.type == "cuda" else ("contiguous", "channels_last")
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    table[f"tdpo with {other} weights instead of {usual}"] = lambda: in_memory_format(bench, plan, formats[other])
    return table


def climb(bench: Bench, plan: Plan, rounds: int) -> list[dict[str, Any]]:
    """One row per rung: median seconds, and the gain over the rung before (median of the rounds' ratios)."""
    measured = interleave(rungs(bench, plan), rounds)
    rows, before, clock = [], None, clock_of(bench)
    for name, timed in measured.items():
        row = {"rung": name, **{f"{phase}_seconds": statistics.median(seconds(timed, phase, clock)) for phase in ("sampling", "training", "epoch")}}
        if before is not None:
            for phase in ("sampling", "training", "epoch"):
                row[f"{phase}_gain"] = statistics.median(
                    a / b for a, b in zip(seconds(before, phase, clock), seconds(timed, phase, clock), strict=True)
                )
        rows.append(row)
        before = timed
    return rows


def compiled(bench: Bench, plan: Plan, rounds: int) -> dict[str, Any]:
    """torch.compile of the UNet's blocks, last because it stays: its warm-up apart, and the epoch at which it has paid."""
    clock = clock_of(bench)
    eager = seconds([our_epoch(bench, plan) for _ in range(rounds)], "epoch", clock)
    bench.policy.cut_up(checkpointing=False, compile=True)
    first = seconds([our_epoch(bench, plan)], "epoch", clock)[0]
    later = seconds([our_epoch(bench, plan) for _ in range(rounds)], "epoch", clock)
    bench.restart()
    trajectory = ours.sample(bench, plan)
    drift = ours.train(bench, plan, trajectory, ours.credit(bench, trajectory, ours.score(bench, trajectory)), ours.order(bench)).ratio_drift
    before, after = statistics.median(eager), statistics.median(later)
    saved, warm_up = before - after, first - after
    return {
        "epoch_gain": before / after, "warm_up_seconds": warm_up, "break_even_epoch": warm_up / saved if saved > 0 else None, "ratio_drift": drift,
    }  # fmt: skip
