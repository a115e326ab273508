"""What charts are drawn with: the plotting area, text and lines, gaps, labels that keep their distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape


@dataclass(frozen=True)
class Frame:
    """The plotting area of an SVG of `width` x `height` units, and where numbers are in it."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    @property
    def end(self) -> float:
        return self.width - self.right

    def x(self, value: float) -> float:
        low, high = self.x_span
        return self.left + (value - low) / (high - low) * (self.end - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return self.floor - (value - low) / (high - low) * (self.floor - self.top)


def span(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """(low, high) around all values with some room, low < high; `zero` begins (or ends) at 0."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low)
    if room <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 0.5
    return low if zero and low == 0 else low - room, high if zero and high == 0 < -low else high + room


def stretches(*columns: Sequence[float | None]) -> list[tuple[int, int]]:
    """[first, last) of every stretch without a missing value in any column."""
    there = [False, *(all(value is not None for value in row) for row in zip(*columns, strict=True)), False]
    edges = [i for i in range(len(there) - 1) if there[i] != there[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def apart(heights: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Ascending heights pushed so that neighbours are `distance` apart: down from `low`, then up again from `high`."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + distance if moved else low))
    ceiling = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - distance
    return moved


def group(look: str, inside: str) -> str:
    return f'<g class="{look}">{inside}</g>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def circle(x: float, y: float, radius: float, kind: str = "dot") -> str:
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path."""
    return "M" + "L".join(f"{number(x)},{number(y)}" for x, y in points)


def number(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{round(value, 1):g}"
