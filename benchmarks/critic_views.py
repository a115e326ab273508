"""What the critic's view and state are worth: explained variance, rise of the rewards and time, for each over several seeds.

    python benchmarks/critic_views.py --views decode rgb --states x_t --seeds 1 2 3 [--base sandbox] [--preset quickstart] [--epochs 25]

prints a JSON line per run and a Markdown table. `tiny` needs --set model.tiny_vae=FOLDER. A rise is the mean of the last fifth of the
epochs less that of epoch 0, in standard deviations of epoch 0. Seconds are the CPU's, per epoch: other programs do not lengthen them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from tdpo_cli.config import preset as presets
from tdpo_cli.console import Console
from tdpo_cli.machine import memory
from tdpo_cli.machine.world import World
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.state import build

COLUMNS = {
    "explained_early": "explained variance, first half", "explained_late": "second half", "trained_rise": "trained reward, sd",
    "gold_rise": "gold, sd", "cpu_seconds": "CPU seconds per epoch", "rollout_seconds": "rollout, seconds per epoch",
}  # fmt: skip


def measure(preset: presets.Preset) -> dict[str, float]:
    """Train one run in memory. -> the numbers of COLUMNS"""
    job, console = build(preset, World(), memory.Plan.of(memory.CPU_MICRO_BATCH)), Console(quiet=True)
    began = time.process_time()
    rows = [run_epoch(job, epoch, console) for epoch in range(preset.run.epochs)]
    seconds = (time.process_time() - began) / len(rows)
    explained, half = [row["critic_explained_variance"] for row in rows], len(rows) // 2
    return {
        "explained_early": statistics.fmean(explained[: max(1, half)]), "explained_late": statistics.fmean(explained[half:]),
        "trained_rise": rise(rows, preset.reward.train), "gold_rise": rise(rows, "gold"),
        "cpu_seconds": seconds, "rollout_seconds": statistics.median(row["seconds/rollout"] for row in rows),
    }  # fmt: skip


def rise(rows: Sequence[dict], reward: str) -> float:
    """The last fifth of the epochs against epoch 0, in standard deviations of epoch 0."""
    last = rows[-max(1, len(rows) // 5) :]
    return (statistics.fmean(row[f"rewards/{reward}/mean"] for row in last) - rows[0][f"rewards/{reward}/mean"]) / rows[0][f"rewards/{reward}/std"]


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Markdown: a row per view and state, each number the mean over seeds with the least and the largest."""
    lines = ["| view | state | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for (view, state), runs in found.items():
        cells = []
        for name in COLUMNS:
            values = [run[name] for run in runs]
            cells.append(f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {view} | {state} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sandbox")
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--views", nargs="+", default=["decode", "rgb"])
    parser.add_argument("--states", nargs="+", default=["x_t", "x0"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    more, found = [presets.parse_override(text) for text in args.set], {}
    for seed in args.seeds:  # outermost, so that a run that is stopped has compared something
        for view in args.views:
            for state in args.states:
                chosen = {
                    "model.base": args.base, "algorithm.critic_view": view, "algorithm.critic_state": state, "run.seed": seed,
                    "run.epochs": args.epochs, "run.preview_images": 0,
                }  # fmt: skip
                row = measure(presets.load(args.preset, [*chosen.items(), *more]))
                found.setdefault((view, state), []).append(row)
                print(json.dumps({"view": view, "state": state, "seed": seed} | {name: round(value, 4) for name, value in row.items()}), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
