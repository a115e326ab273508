"""Charts of a few values with their intervals: one row each, or paths through the plane of two quantities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo_cli.report import svg
from tdpo_cli.report.charts import NARROW, Series, figure, legend_entry
from tdpo_cli.report.numbers import finite, known, signed, tick_labels, ticks

Interval = tuple[float, float, float]  # mean, low, high
Estimate = Mapping[str, Any]  # of cross_eval.json: {"mean", "low", "high"}, each may be null


@dataclass(frozen=True)
class Row:
    """One value with its interval."""

    name: str
    value: Interval
    look: str


def interval_chart(title: str, rows: Sequence[Row], note: str = "", baseline: float = 0.0, percent: bool = False) -> str:
    """Points with horizontal intervals, one row each, and a stronger line at `baseline`."""
    if not rows:
        return ""
    x_span = svg.span([baseline, *(value for row in rows for value in row.value)])
    frame = svg.Frame(NARROW[0], 30 + 30 * len(rows), 116, 16, 6, 24, x_span, (0, len(rows)))
    x_ticks = ticks(*x_span)
    parts = [frame.x_axis(x_ticks, tick_labels(x_ticks, percent)[0], baseline, grid=True)]
    for i, row in enumerate(rows):
        mean, low, high = row.value
        y = frame.y(len(rows) - i - 0.5)
        parts.append(svg.text(frame.left - 10, y + 4, svg.cut(row.name, 16), "end"))
        parts.append(f'<g class="{row.look}">{svg.line(frame.x(low), y, frame.x(high), y, "whisker")}{svg.circle(frame.x(mean), y, 4.5)}</g>')
    return figure(title, note, svg.drawing(frame.width, frame.height, title, "".join(parts)))


@dataclass(frozen=True)
class Track:
    """A path through the plane, in the order of time."""

    name: str
    x: Sequence[Interval]
    y: Sequence[Interval]
    look: str
    note: str = ""
    mark: str = ""  # a character in the ring at the end, for more paths than colours


def track_chart(title: str, tracks: Sequence[Track], x_label: str, y_label: str, note: str = "") -> str:
    """Paths that start at (0, 0); a ring marks the end, a faint cross its intervals."""
    tracks = [track for track in tracks if track.x]
    if not tracks:
        return ""
    spans = [_span([track.x for track in tracks]), _span([track.y for track in tracks])]
    frame = svg.Frame(NARROW[0], 290, 46, 16, 26, 42, *spans)
    x_ticks, y_ticks = ticks(*frame.x_span), ticks(*frame.y_span)
    parts = [frame.y_axis(y_ticks, tick_labels(y_ticks)[0], 0.0), frame.x_axis(x_ticks, tick_labels(x_ticks)[0], 0.0, grid=True)]
    parts += [svg.text(4, 13, f"↑ {y_label}", "start"), svg.text(frame.end, frame.height - 4, f"{x_label} →", "end")]
    for track in tracks:
        placed = [(frame.x(0), frame.y(0)), *((frame.x(x[0]), frame.y(y[0])) for x, y in zip(track.x, track.y, strict=True))]
        (_, x_low, x_high), (_, y_low, y_high) = track.x[-1], track.y[-1]
        x, y = placed[-1]
        cross = svg.line(frame.x(x_low), y, frame.x(x_high), y, "whisker faint") + svg.line(x, frame.y(y_low), x, frame.y(y_high), "whisker faint")
        dots = "".join(svg.circle(*point, 2.4) for point in placed[1:-1])
        ring = svg.circle(x, y, 8 if track.mark else 5, "ring") + (svg.text(x, y + 4, track.mark, "middle") if track.mark else "")
        parts.append(f'<g class="{track.look}">{cross}<path class="line" d="{svg.polyline(placed)}"/>{dots}{ring}</g>')
    entries = "".join(legend_entry(f"{track.mark} {track.name}".strip(), track.look, track.note) for track in tracks)
    return figure(title, note, f'<ul class="legend">{entries}</ul>' + svg.drawing(frame.width, frame.height, title, "".join(parts)))


def _span(paths: Sequence[Sequence[Interval]]) -> tuple[float, float]:
    """Around the start, every mean, and the interval of every end."""
    return svg.span([0.0, *(point[0] for path in paths for point in path), *(value for path in paths for value in path[-1])])


# --- from the estimates of cross_eval.json ---------------------------------------------------------------------------------
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
