"""Run the study: one training run and one result file per arm and seed. Stop it at any time; the same command goes on.

    python benchmarks/overoptimisation/run.py --workers 2

First the pilot (every method at every learning rate of the grid, on a seed used for nothing else), which fixes each method's
learning rate by one rule; then the methods, seed by seed; then the variants. A run is the plain command `tdpo train` with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms

from tdpo_cli.storage import disk

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COLUMNS = (
    "reward_queries", "updates", "mean_kl", "approx_kl", "policy_clip_fraction", "policy_grad_norm", "critic_loss", "critic_explained_variance",
    "agreement", "dormant_fraction", "reset", "seconds/total",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One run of the study."""

    arm: str
    seed: int
    epochs: int
    rate: float
    folder: str  # of its result file, below results/

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.rate:g}-seed{self.seed}" if self.folder == "pilot" else f"{self.arm}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / self.folder / f"{self.name}.json"


def pilot() -> list[Task]:
    return [Task(arm, arms.PILOT_SEED, arms.PILOT_EPOCHS, rate, "pilot") for rate in arms.GRID for arm in arms.METHODS]


def rates() -> dict[str, float]:
    """Method -> learning rate, from the pilot's result files."""
    proxy: dict[str, dict[float, float]] = {arm: {} for arm in arms.METHODS}
    worst_kl: dict[str, dict[float, float]] = {arm: {} for arm in arms.METHODS}
    for task in pilot():
        columns = json.loads(task.result.read_text())["columns"]
        last = columns["rewards/aesthetic/mean"][-(task.epochs // 5) :]
        proxy[task.arm][task.rate] = sum(last) / len(last)
        worst_kl[task.arm][task.rate] = max(columns["approx_kl"])
    return {arm: arms.best_rate(proxy[arm], worst_kl[arm]) for arm in arms.METHODS}


def study(rates: dict[str, float]) -> Iterator[Task]:
    """The methods on every seed, then the variants on every seed: what matters most comes first."""
    for seed in arms.SEEDS:
        yield from (Task(arm, seed, arms.EPOCHS, rates[arm], "main") for arm in arms.METHODS)
    for seed in arms.SEEDS:
        yield from (Task(arm, seed, arms.EPOCHS, rates[arms.method_of(arm)], "variants") for arm in arms.VARIANTS)


def run(task: Task, work: Path) -> None:
    """Train, or train on, and write the result file."""
    if task.result.exists():
        return
    out = work / task.folder / task.name
    changes = arms.overrides(task.arm) | {"update.learning_rate": task.rate, "run.seed": task.seed, "run.epochs": task.epochs}
    command = [sys.executable, "-m", "tdpo_cli", "train", "--quiet", "--out", str(out)]
    if (out / "preset.json").exists():
        command += ["--resume"]
    else:
        command += ["--preset", str(HERE / "study.toml")]
        for key, value in changes.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
    print(f"start {task.folder}/{task.name}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    disk.write_text(task.result, json.dumps(result(task, out, changes)) + "\n")
    print(f"done  {task.folder}/{task.name}", flush=True)


def result(task: Task, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What the figures need of a run: every epoch's row, six digits."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name in COLUMNS or name.startswith("rewards/")]
    digits = lambda value: float(f"{value:.6g}") if isinstance(value, float) else value
    environment = json.loads((out / "env.json").read_text())[-1]
    return {
        "arm": task.arm, "seed": task.seed, "epochs": task.epochs, "overrides": changes, "commit": commit(),
        "tdpo": environment["tdpo"], "python": environment["python"], "versions": environment["versions"],
        "columns": {name: [digits(row[name]) for row in rows] for name in names},
    }  # fmt: skip


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimisation"), help="where the run folders go")
    parser.add_argument("--arm", action="append", help="only this arm; may be repeated")
    given = parser.parse_args()

    def all_of(tasks: list[Task]) -> None:
        wanted = [task for task in tasks if not given.arm or task.arm in given.arm]
        with ThreadPoolExecutor(given.workers) as pool:
            for finished in [pool.submit(run, task, given.work) for task in wanted]:
                finished.result()

    all_of(pilot())
    all_of(list(study(rates())))


if __name__ == "__main__":
    main()
