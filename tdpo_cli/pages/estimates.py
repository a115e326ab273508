"""Estimates of a cross-evaluation, {"mean", "low", "high"} with nulls, as numbers, series and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdpo_cli.pages.charts import Series
from tdpo_cli.pages.intervals import Interval
from tdpo_cli.pages.numbers import finite, known, signed

Estimate = Mapping[str, Any]


def mean(cell: Estimate | None) -> float | None:
    return None if cell is None else finite(cell.get("mean"))


def interval(cell: Estimate | None) -> Interval | None:
    """(mean, low, high), the mean thrice where there is no interval; None where there is no mean."""
    middle = mean(cell)
    if middle is None:
        return None
    low, high = finite(cell.get("low")), finite(cell.get("high"))
    return middle, middle if low is None else low, middle if high is None else high


def series(name: str, cells: Sequence[Estimate | None], look: str, note: str) -> Series:
    columns = [[None if cell is None else finite(cell.get(key)) for cell in cells] for key in ("mean", "low", "high")]
    return Series(name, *columns, look, note)


def bounds(cell: Estimate | None, write: Callable[[float | None], str] = signed) -> str:
    """low … high, or nothing"""
    ends = known([finite(cell.get("low")), finite(cell.get("high"))]) if cell else []
    return f"{write(ends[0])} … {write(ends[1])}" if len(ends) == 2 else ""


def with_bounds(cell: Estimate | None, write: Callable[[float | None], str] = signed) -> str:
    ends = bounds(cell, write)
    return write(mean(cell)) + (f" <small>{ends}</small>" if ends else "")
