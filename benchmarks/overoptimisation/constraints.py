"""Does a constraint keep the true reward from falling? Arms: nothing, one KL coefficient, a bound on a monitored reward.

    python benchmarks/overoptimisation/constraints.py --seeds 1 2 3 4 5 --epochs 60
    python benchmarks/overoptimisation/constraints.py --table

One `tdpo train` after the other, seed by seed, with one thread; stop it at any time, the same command goes on. Arms are compared at the
highest trained reward that all arms of a seed reach, and at the end. `--table` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import crossing, interval

from tdpo_cli.config.settings import COMBINED
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.storage import disk

KL_COEF = 0.1  # of a pilot on seed 101 (1 and 0.1): the largest that kept half of the trained reward's rise
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "kl": {"update.kl_coef": KL_COEF},
    "hpsv2": {"reward.at_least.hpsv2": -0.2},
    "imagereward": {"reward.at_least.imagereward": -0.2},
    "hpsv2-rises": {"reward.at_least.hpsv2": 1.0},  # a bound that binds from the start
}
USUAL = ("none", "hpsv2", "kl")


@dataclass(frozen=True)
class Run:
    """One result file. Curves are averages over verdict.WINDOW epochs of changes since epoch 0, in its standard deviations."""

    arm: str
    seed: int
    trained: list[float]
    gold: list[float]
    multiplier: list[float]  # as used, raw; empty without a constraint

    @property
    def fall(self) -> float:
        """From gold's highest point to the end."""
        return max(self.gold) - self.gold[-1]


def train(arm: str, seed: int, given: argparse.Namespace) -> None:
    """Train, or train on, and write the result file. Nothing where it exists."""
    out, file = given.out / f"{arm}-seed{seed}", given.out / f"{arm}-seed{seed}.json"
    if file.exists():
        return
    command = [sys.executable, "-m", "tdpo_cli", "train", "--quiet", "--out", str(out)]
    if (out / "preset.json").exists():
        command += ["--resume"]
    else:
        changes = {"run.seed": seed, "run.epochs": given.epochs, "run.save_every": given.epochs, "run.preview_images": 0, **ARMS[arm]}
        if given.base is not None:
            changes["model.base"] = given.base
        command += ["--preset", given.preset, *(part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}"))]
    print(f"start {arm}, seed {seed}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name.startswith(("rewards/", "constraints/")) or name in ("approx_kl", "kl_loss", "agreement")]
    preset = json.loads((out / "preset.json").read_text())
    found = {"arm": arm, "seed": seed, "preset": preset, "columns": {name: [row[name] for row in rows] for name in names}}
    disk.write_text(file, json.dumps(found) + "\n")


def load(folder: Path) -> list[Run]:
    runs = []
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        columns, train = found["columns"], found["preset"]["reward"]["train"]
        name = COMBINED if f"rewards/{COMBINED}/mean" in columns else train
        multipliers = [values for key, values in columns.items() if key.endswith("/multiplier")]
        runs.append(Run(found["arm"], found["seed"], _curve(columns, name), _curve(columns, "gold"), multipliers[0] if multipliers else []))
    return runs


def _curve(columns: dict[str, list[float]], name: str) -> list[float]:
    means, spread = columns[f"rewards/{name}/mean"], columns[f"rewards/{name}/std"][0]
    return verdict.averaged([(mean - means[0]) / spread for mean in means])


def table(runs: Sequence[Run], arms: Sequence[str] = USUAL) -> list[str]:
    """Lines: each arm at equal trained reward and at the end, over the seeds that have all arms, with 95 % intervals."""
    of = {(run.arm, run.seed): run for run in runs}
    seeds = [seed for seed in sorted({run.seed for run in runs}) if all((arm, seed) in of for arm in arms)]
    level = {seed: min(max(of[arm, seed].trained) for arm in arms) for seed in seeds}
    equal = {key: crossing(run.trained, run.gold, level[key[1]]) for key, run in of.items() if key[1] in level}
    lines = [
        f"Seeds {', '.join(map(str, seeds)) or 'none'} have all arms. In standard deviations of epoch 0, averages of {verdict.WINDOW} epochs.",
        "Equal: at the highest trained reward that all arms of a seed reach ("
        + ", ".join(f"seed {seed}: {value:+.2f}" for seed, value in level.items()) + ").",
        "",
        "| arm | gold, equal | minus `none` | trained, end | gold, end | minus `none` | gold's fall from its peak | largest multiplier |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in arms:
        mine, plain = [of[arm, seed] for seed in seeds], [of["none", seed] for seed in seeds]
        cells = [
            [equal[arm, seed] for seed in seeds],
            [equal[arm, seed] - equal["none", seed] for seed in seeds],
            [run.trained[-1] for run in mine],
            [run.gold[-1] for run in mine],
            [run.gold[-1] - other.gold[-1] for run, other in zip(mine, plain, strict=True)],
            [run.fall for run in mine],
        ]
        shown = ["-" if i in (1, 4) and arm == "none" else str(interval(values) or "-") for i, values in enumerate(cells)]
        lines.append(f"| {' | '.join([arm, *shown, _largest(mine)])} |")
    return lines


def _largest(runs: Sequence[Run]) -> str:
    return ", ".join(f"{max(run.multiplier):.2f}" for run in runs if run.multiplier) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(USUAL))
    parser.add_argument("--preset", default="quickstart", help="what every arm changes; it must watch gold and the constrained rewards")
    parser.add_argument("--base", default=None, help="another base model than the preset's")
    parser.add_argument("--out", type=Path, default=Path("runs/constraints"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    for seed in () if given.table else given.seeds:
        for arm in given.arms:
            train(arm, seed, given)
    print("\n".join(table(load(given.out), given.arms)))


if __name__ == "__main__":
    main()
