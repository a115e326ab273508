"""What a file of scores says as a whole: mean, spread, quantiles, the best and the worst images."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tdpo_cli.console import Console, significant
from tdpo_cli.rewards import short_name
from tdpo_cli.score.score_file import Row

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = 3  # best and worst images of each reward


def summarise(rows: Iterable[Row], rewards: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reward -> count, missing, mean, std, quantiles, best, worst. Keeps one number per row and reward, no row."""
    scores = {name: array("d") for name in rewards}
    best: dict[str, list] = {name: [] for name in rewards}
    worst: dict[str, list] = {name: [] for name in rewards}
    count = 0
    for count, row in enumerate(rows, 1):
        for name in rewards:
            score = row[name]
            if score is None:
                continue
            scores[name].append(score)
            _keep(best[name], score, -count, row["image"])  # of equal scores the first in name order
            _keep(worst[name], -score, -count, row["image"])
    return {
        name: {
            "count": len(scores[name]),
            "missing": count - len(scores[name]),
            **_spread(np.array(scores[name])),
            "best": [{"image": image, "score": score} for score, _, image in sorted(best[name], reverse=True)],
            "worst": [{"image": image, "score": -score} for score, _, image in sorted(worst[name], reverse=True)],
        }
        for name in rewards
    }


def _keep(heap: list, score: float, order: int, image: str) -> None:
    (heapq.heappush if len(heap) < SHOWN else heapq.heappushpop)(heap, (score, order, image))


def _spread(scores: np.ndarray) -> dict[str, Any]:
    """std with n in the denominator; everything None where there is no score"""
    if not len(scores):
        return {"mean": None, "std": None, "quantiles": None}
    values = np.quantile(scores, QUANTILES).tolist()
    quantiles = {str(q): value for q, value in zip(QUANTILES, values, strict=True)}
    return {"mean": float(scores.mean()), "std": float(scores.std()), "quantiles": quantiles}


def show(summary: dict[str, dict[str, Any]], console: Console) -> None:
    """A table of the numbers, and the images at both ends."""
    columns = ["reward", "images", "mean", "std", *(f"{q:.0%}" for q in QUANTILES)]
    rows = []
    for name, one in summary.items():
        quantiles = one["quantiles"].values() if one["quantiles"] else [None] * len(QUANTILES)
        numbers = [one["mean"], one["std"], *quantiles]
        rows.append([short_name(name), f"{one['count']:,}", *(significant(number, 4) for number in numbers)])
    console.table(columns, rows)
    for name, one in summary.items():
        for end in ("best", "worst"):
            console.say(
                f"{end} {short_name(name)}: " + (", ".join(f"{entry['image']} ({significant(entry['score'], 4)})" for entry in one[end]) or "-")
            )
