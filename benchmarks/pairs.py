"""Times of candidates that run in turn: wall time, and CPU time of this process, its threads and its child processes."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import spread

Times = dict[str, list[tuple[float, float]]]  # candidate -> (wall, CPU) seconds of every round


def cpu_seconds() -> float:
    """Of this process and of its children: those that ended and, on Linux, those that still run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _living_children()


def _living_children() -> float:
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listing.exists():
        return 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(cpu_ticks(Path(f"/proc/{child}/stat").read_text()) / ticks for child in listing.read_text().split())


def cpu_ticks(stat: str) -> int:
    """User and system ticks of a line of /proc/PID/stat. The name, in brackets, may hold spaces and brackets."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def in_turn(candidates: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Run all candidates `rounds` times; the order turns by one each round."""
    names, times = list(candidates), {name: [] for name in candidates}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            wall, cpu = time.perf_counter(), cpu_seconds()
            candidates[name]()
            times[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return times


def compared(times: Times, ours: str, images: int) -> dict[str, Any]:
    """Per candidate: images a second of each clock; of all but `ours` also the ratio to `ours` in the same round."""
    report: dict[str, Any] = {}
    for name, rows in times.items():
        one = report[name] = {}
        for clock, label in enumerate(("wall", "cpu")):
            one[f"images_per_{label}_second"] = spread([images / row[clock] for row in rows])
            if name != ours:
                one[f"{label}_ratio"] = spread([row[clock] / own[clock] for row, own in zip(rows, times[ours], strict=True)])
    return report


def show(title: str, report: dict[str, Any]) -> None:
    """One line per candidate."""
    print(title)
    for name, one in report.items():
        line = f"  {name:<24} {one['images_per_cpu_second']['median']:8.2f} images a CPU second"
        for label in ("cpu", "wall"):
            if ratio := one.get(f"{label}_ratio"):
                line += f"   {label} ratio {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
        print(line)


def facts() -> dict[str, Any]:
    """Machine and versions."""
    import diffusers
    import torch
    import transformers

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return {"device": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(), "versions": versions}
