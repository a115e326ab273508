"""From reward curves to plain words: how far did a reward rise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


TRUE_REWARDS = frozenset({"gold"})  # the truth of the sandbox: never taken for a learned reward


def rise(rows: Sequence[Mapping[str, Any]], reward: str) -> float | None:
    """Mean of the last fifth of the epochs minus mean of the first fifth, in units of epoch 0's standard deviation."""
    means = [row[f"rewards/{reward}/mean"] for row in rows]
    std = rows[0][f"rewards/{reward}/std"] if rows else None
    if not std or len(rows) < 2 or any(mean is None for mean in means):
        return None
    fifth = max(1, len(means) // 5)
    return (sum(means[-fifth:]) - sum(means[:fifth])) / fifth / std
