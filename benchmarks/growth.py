"""How an epoch's time and memory grow with steps, samples and resolution: a JSON of measurements and fits, and a plot.

    python benchmarks/growth.py --out growth.json --plot growth.png

Memory is that of tensors that are alive at the same time (on a GPU the allocator's own count), beyond the networks. The straight
line through an axis' points says what one more step, or sample, costs; a stored step of a sample should be all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import ladder  # noqa: E402
import torch  # noqa: E402
from setup import SIZES, Bench, Size, build  # noqa: E402
from timing import clock_of  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from tdpo_cli.machine.memory import Plan  # noqa: E402

BASE = dataclasses.replace(SIZES["tiny"], samples=24, steps=4, batch=12)
PLAN = Plan(12, 12, 12)  # fixed: pieces of one size, so that only their number grows
STEPS, SAMPLES, SIDES = (2, 4, 6, 8, 12), (12, 24, 36, 48, 72), (8, 12, 16)


class Alive(TorchDispatchMode):
    """Bytes of all tensors made within, as far as they are alive at the same time. Slow: not for timings."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter((out, args)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, count: int) -> None:
        self.now -= count


def at(bench: Bench, size: Size) -> Bench:
    """The same networks with another number of samples or steps, or another resolution."""
    from tdpo_cli.config import preset as presets

    changes = [("rollout.samples_per_epoch", size.samples), ("rollout.steps", size.steps), ("update.batch_size", size.batch)]
    bench.preset, bench.size = presets.override(bench.preset, changes), size
    bench.policy.latent_shape = (bench.policy.latent_shape[0], size.latent, size.latent)
    bench.policy.set_schedule(size.steps, bench.preset.rollout.eta)
    return bench


def seconds(bench: Bench) -> float:
    return sum(times[clock_of(bench)] for times in ladder.our_epoch(bench, PLAN).values())


def peak_bytes(bench: Bench) -> int:
    """Beyond the networks' own."""
    gc.collect()
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        ladder.our_epoch(bench, PLAN)
        return torch.cuda.max_memory_allocated(bench.device) - before
    own = sum(p.untyped_storage().nbytes() for network in (*bench.networks, bench.encoder) for p in network.parameters())
    with Alive() as alive:
        ladder.our_epoch(bench, PLAN)
    return alive.peak - own


def stored_bytes(bench: Bench) -> int:
    """Of one step of one sample: the latent and the critic's embedding in fp32."""
    channels, height, width = bench.policy.latent_shape
    return 4 * (channels * height * width + bench.encoder.embed_dim)


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares y = slope x + start, and how much of the variance it explains."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    start = mean_y - slope * mean_x
    residual = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return {"slope": slope, "start": start, "r_squared": 1 - residual / sum((b - mean_y) ** 2 for b in y)}


def measure(device: torch.device, rounds: int, axes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    bench = build(BASE, device)
    points = [
        (axis, value, dataclasses.replace(BASE, **{axis: value})) for axis, values in axes.items() for value in values
    ]  # fmt: skip
    best: dict[tuple[str, int], float] = {}
    for number in range(rounds):  # interleaved; the fastest of the rounds, what others on the machine take only adds
        for axis, value, size in points if number % 2 == 0 else reversed(points):
            spent = seconds(at(bench, size))
            best[axis, value] = min(best.get((axis, value), spent), spent)
    report: dict[str, Any] = {"base": dataclasses.asdict(BASE), "plan": PLAN.as_dict(), "rounds": rounds, "axes": {}}
    for axis, values in axes.items():
        rows = []
        for value in values:
            here = at(bench, dataclasses.replace(BASE, **{axis: value}))
            rows.append(
                {"value": value, "seconds": best[axis, value], "peak_bytes": peak_bytes(here), "stored_bytes_per_step_and_sample": stored_bytes(here)}
            )
        amount = [row["value"] ** 2 if axis == "latent" else row["value"] for row in rows]
        report["axes"][axis] = {
            "points": rows, "time": line(amount, [row["seconds"] for row in rows]), "memory": line(amount, [row["peak_bytes"] for row in rows]),
        }  # fmt: skip
    at(bench, BASE)
    for axis, others in (("steps", BASE.samples), ("samples", BASE.steps)):
        if axis in report["axes"]:
            report["axes"][axis]["bytes_per_step_and_sample"] = report["axes"][axis]["memory"]["slope"] / others
    return report


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"steps": "denoising steps", "samples": "samples", "latent": "latent side (squared)"}
    figure, panels = plt.subplots(2, len(report["axes"]), figsize=(3.4 * len(report["axes"]), 5), squeeze=False)
    for column, (axis, data) in zip(panels.T, report["axes"].items(), strict=True):
        x = [row["value"] ** 2 if axis == "latent" else row["value"] for row in data["points"]]
        for panel, key, scale, name in ((column[0], "seconds", 1, "time"), (column[1], "peak_bytes", 1e-6, "memory")):
            fit = data[name]
            panel.plot(x, [row[key] * scale for row in data["points"]], "o", color="tab:blue")
            panel.plot([0, max(x)], [fit["start"] * scale, (fit["start"] + fit["slope"] * max(x)) * scale], color="0.6", lw=1, zorder=0)
            top = 1.08 * scale * max(row[key] for row in data["points"])
            panel.set(xlim=(0, 1.05 * max(x)), ylim=(0, top), ylabel="seconds an epoch" if name == "time" else "peak of tensors, MB")
            panel.set_title(f"R² = {fit['r_squared']:.4f}", fontsize=9)
        column[1].set_xlabel(titles[axis])
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    parser.add_argument("--plot", type=Path, default=Path("growth.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(torch.device(options.device), options.rounds, {"steps": STEPS, "samples": SAMPLES, "latent": SIDES})
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    plot(report, options.plot)
    for axis, data in report["axes"].items():
        stored = f"; {data['bytes_per_step_and_sample']:.0f} bytes per step and sample" if "bytes_per_step_and_sample" in data else ""
        print(f"{axis}: time R^2 {data['time']['r_squared']:.5f}, memory R^2 {data['memory']['r_squared']:.5f}{stored}")


if __name__ == "__main__":
    main()
