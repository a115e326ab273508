"""From result files to numbers: curves, values at equal queries, steps, KL or proxy, intervals over seeds, verdict against truth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.config import preset as presets
from tdpo_cli.overoptimisation import verdict

PROXY, GOLD = "rewards/aesthetic/mean", "rewards/gold/mean"
AXES = {"queries": "reward_queries", "steps": "updates", "KL": "mean_kl", "proxy": PROXY}
WARNINGS = ("over-optimising", "declining", "doubtful")  # verdicts that say: do not trust the rise
# two-sided 95 % quantiles of Student's t, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Run:
    """One result file."""

    arm: str
    seed: int
    rate: float
    columns: dict[str, list[float | None]]  # metrics.jsonl by column, one entry per epoch

    def smooth(self, column: str) -> list[float]:
        """Means of verdict.WINDOW successive epochs; entry i is of epochs i .. i+WINDOW-1."""
        return verdict.averaged(self.columns[column])

    def at(self, axis: str, level: float, column: str = GOLD) -> float | None:
        """The smoothed column where the smoothed axis first reaches `level`, interpolated; None if it never does."""
        return crossing(self.smooth(AXES[axis]), self.smooth(column), level)

    def rows(self) -> list[dict[str, float | int | None]]:
        """As metrics.jsonl has them."""
        return [{"epoch": i} | {name: values[i] for name, values in self.columns.items()} for i in range(len(self.columns[GOLD]))]


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """y where x first reaches `level`, interpolated; None if it never does."""
    if x[0] >= level:
        return y[0]
    for i in range(1, len(x)):
        if x[i] >= level:
            share = (level - x[i - 1]) / (x[i] - x[i - 1])
            return y[i - 1] + share * (y[i] - y[i - 1])
    return None


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def load(folder: Path) -> list[Run]:
    runs = []
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        runs.append(Run(found["arm"], found["seed"], found["overrides"]["update.learning_rate"], found["columns"]))
    return runs


def of(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """seed -> the arm's run"""
    return {run.seed: run for run in runs if run.arm == arm}


def interval(values: Sequence[float]) -> Interval | None:
    """None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, T95[n - 1] * spread / math.sqrt(n), n)


def difference(runs: Sequence[Run], arm: str, other: str, axis: str, level: float, column: str = GOLD) -> Interval | None:
    """`arm` minus `other` at equal `axis`, paired by seed; seeds where one never reaches the level are left out (see .count)."""
    mine, theirs = of(runs, arm), of(runs, other)
    pairs = [(mine[seed].at(axis, level, column), theirs[seed].at(axis, level, column)) for seed in mine.keys() & theirs.keys()]
    return interval([a - b for a, b in pairs if a is not None and b is not None])


def peak_and_fall(run: Run) -> tuple[float, float]:
    """(highest smoothed gold, last smoothed gold)"""
    gold = run.smooth(GOLD)
    return max(gold), gold[-1]


# --- the verdict against the truth --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judged:
    """What the verdict said of a run, and what gold did."""

    arm: str
    seed: int
    kind: str  # the verdict at the end
    since: int | None  # the turning point it names
    first: int | None  # the epoch after which it first gave a WARNING
    gold_peak: int | None  # epoch of gold's peak, if gold has fallen from it by the end
    gold_seen: int | None  # the epoch after which gold itself, read by the same rule, first says so


def judge(run: Run) -> Judged:
    """The verdict of every epoch, and the same rule applied to gold."""
    watched = [name.split("/")[1] for name in run.columns if name.endswith("/mean") and name not in (PROXY, GOLD)]
    preset = presets.override(presets.Preset(), [("reward.train", "aesthetic"), ("reward.watch", watched)])
    rows = run.rows()
    said = [verdict.read(rows[: n + 1], preset) for n in range(len(rows))]
    falls = [turned(run.columns[GOLD][: n + 1]) for n in range(len(rows))]
    first = next((n for n, found in enumerate(said) if found.kind in WARNINGS), None)
    seen = next((n for n, peak in enumerate(falls) if peak is not None), None)
    return Judged(run.arm, run.seed, said[-1].kind, said[-1].since, first, falls[-1], seen)


def turned(gold: Sequence[float]) -> int | None:
    """The epoch of the curve's peak if it has fallen significantly from it by its end, by the verdict's own rule."""
    window = verdict.WINDOW
    if len(gold) < 2 * window:
        return None
    smooth = verdict.averaged(gold)
    peak = max(range(len(smooth)), key=smooth.__getitem__)
    fallen = len(smooth) - 1 - peak >= window and smooth[peak] - smooth[-1] > verdict.margin(gold)
    return peak + window // 2 if fallen else None
