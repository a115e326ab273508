"""Columns of a run's metrics rows, ready to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.pages.charts import PLAIN, Chart, Series
from tdpo_cli.pages.numbers import finite

Rows = Sequence[Mapping[str, Any]]


def column(rows: Rows, key: str) -> list[float | None]:
    """[epochs]; None where it is null, NaN or not recorded."""
    return [finite(row.get(key)) for row in rows]


def chart(rows: Rows, title: str, note: str, columns: Sequence[tuple[str, str]], **more: Any) -> Chart:
    """A chart over epochs of the columns (key, name)."""
    series = [Series(name, column(rows, key), look=look) for (key, name), look in zip(columns, PLAIN, strict=False)]
    return Chart(title, column(rows, "epoch"), series, note, **more)
