"""Line and area charts over epochs, as figures with inline SVG and a legend that can be read off epoch by epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo_cli.report import svg
from tdpo_cli.report.html import data, escape
from tdpo_cli.report.numbers import finite, known, log_labels, log_ticks, short, tick_labels, ticks

Values = Sequence["float | None"]
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
OTHERS = ("s1", "s2", "s3", "s4", "s5", "s6")  # classes of page.css: rewards that neither train nor are the truth
PLAIN = ("p1", "p2", "p3")  # what is not a reward
NARROW, WIDE = (400, 210), (880, 330)  # units; on a phone and in a column a unit is about a pixel


@dataclass(frozen=True)
class Series:
    """One line: a value for every x, with a band from `low` to `high` where both are known."""

    name: str
    values: Values
    low: Values = ()
    high: Values = ()
    look: str = PLAIN[0]  # a class of page.css: trained, gold, one of OTHERS or PLAIN
    note: str = ""  # stands behind the name in the legend


@dataclass(frozen=True)
class Chart:
    """What is drawn. NaN, infinity and, on a log axis, what is not positive count as missing."""

    title: str
    x: Sequence[float]  # ascending
    series: Sequence[Series]
    note: str = ""  # a sentence below the title
    x_label: str = "epoch"
    log: bool = False
    percent: bool = False
    zero: bool = False  # the y axis reaches 0
    baseline: float | None = None  # a stronger horizontal line
    limit: tuple[float, str] | None = None  # a dotted horizontal line and its name
    markers: Sequence[float] = ()  # vertical dotted lines
    marker_name: str = ""
    since: tuple[float, str] | None = None  # shaded from here on, and why; without a why the legend is silent
    show: Callable[[float | None], str] = short  # a value in the legend
    dots: bool = False  # a dot at every value


def line_chart(chart: Chart, wide: bool = False) -> str:
    """A figure; `wide` adds a second drawing for broad screens, with names at the ends of the lines. Nothing without values."""
    chart = _cleaned(chart)
    values = [value for series in chart.series for part in (series.values, series.low, series.high) for value in known(part)]
    if not values:
        return ""
    if not any(values):
        return figure(chart.title, chart.note, f"<p class=flat>0 at every {escape(chart.x_label)}.</p>")
    drawings = _lines(chart, values, NARROW, "narrow" if wide else "", names=False)
    if wide:
        drawings += _lines(chart, values, WIDE, "wide", names=True)
    return _readable(chart, drawings)


def stacked_chart(chart: Chart) -> str:
    """Areas on top of each other, the first at the bottom; where a value is missing all of them have a gap."""
    chart = _cleaned(chart)
    whole = [all(values) for values in zip(*([v is not None for v in series.values] for series in chart.series), strict=True)]
    if not any(whole):
        return ""
    below: list[float | None] = [0.0 if there else None for there in whole]
    areas = []
    for series in chart.series:
        above = [None if base is None else base + value for base, value in zip(below, series.values, strict=True)]
        areas.append(dataclasses.replace(series, values=above, low=below, high=above))
        below = above
    frame = _frame(chart, [0.0, *known(below)], NARROW)
    shapes = [_ribbon(frame, chart.x, area, "area") for area in areas] + [_line(frame, chart.x, area) for area in areas]
    return _readable(chart, _drawing(frame, chart, _grid(frame, chart) + "".join(shapes)))


def figure(title: str, note: str, inside: str, kind: str = "chart", more: str = "") -> str:
    head = f"<h3>{escape(title)}</h3>" + (f"<p class=note>{escape(note)}</p>" if note else "")
    return f'<figure class="{kind}"{more}>{head}{inside}</figure>\n'


def legend_entry(name: str, look: str, note: str = "", value: str | None = None) -> str:
    """A swatch and a name; `value` is what changes as the chart is read."""
    swatch = {
        "since": '<rect class="since" x="1" y="1" width="22" height="10"/>',
        "marker": svg.line(12, 0, 12, 12, "marker"),
        "limit": svg.line(1, 6, 23, 6, "limit"),
    }.get(look) or svg.line(1, 6, 23, 6, "line")
    read = "" if value is None else f" <b>{escape(value)}</b>"
    more = f" <small>{escape(note)}</small>" if note else ""
    return f'<li class="{look}"><svg class="swatch" viewBox="0 0 24 12" aria-hidden="true">{swatch}</svg><span>{escape(name)}{read}{more}</span></li>'


# --- parts --------------------------------------------------------------------------------------------------------------
def _cleaned(chart: Chart) -> Chart:
    def fine(values: Values) -> list[float | None]:
        return [None if value is None or (chart.log and value <= 0) else value for value in map(finite, values)]

    series = [dataclasses.replace(one, values=fine(one.values), low=fine(one.low), high=fine(one.high)) for one in chart.series]
    return dataclasses.replace(chart, series=[one for one in series if known(one.values)])


def _frame(chart: Chart, values: Sequence[float], size: tuple[float, float], right: float = 14) -> svg.Frame:
    more = [] if chart.baseline is None else [chart.baseline]
    if chart.limit is not None and chart.log:  # on a linear axis a far limit would flatten the lines
        more.append(chart.limit[0])
    first, last = chart.x[0], chart.x[-1]
    x_span = (first, last) if first < last else (first - 0.5, last + 0.5)
    return svg.Frame(*size, 54, right, 20, 22, x_span, svg.span([*values, *more], chart.zero, chart.log), chart.log)


def _lines(chart: Chart, values: Sequence[float], size: tuple[float, float], kind: str, names: bool) -> str:
    frame = _frame(chart, values, size, 22 + 7.4 * max(len(_end_name(series)) for series in chart.series) if names else 14)
    shapes = [_grid(frame, chart), *(_ribbon(frame, chart.x, series, "band") for series in chart.series)]
    # the trained reward is drawn last, on top
    shapes += [_line(frame, chart.x, series, chart.dots) for series in sorted(chart.series, key=lambda series: series.look == "trained")]
    return _drawing(frame, chart, "".join(shapes) + (_names(frame, chart) if names else ""), kind)


def _drawing(frame: svg.Frame, chart: Chart, inside: str, kind: str = "") -> str:
    low, high = frame.x_span
    ends = f' data-left="{svg.number(frame.left)}" data-right="{svg.number(frame.end)}" data-low="{low:g}" data-high="{high:g}"'
    cursor = svg.line(frame.left, frame.top, frame.left, frame.floor, "cursor")
    return svg.drawing(frame.width, frame.height, chart.title, inside + cursor, kind, ends)


def _grid(frame: svg.Frame, chart: Chart) -> str:
    parts = []
    if chart.since is not None and chart.since[0] <= frame.x_span[1]:
        x = max(frame.left, frame.x(chart.since[0]))
        width, height = svg.number(frame.end - x), svg.number(frame.floor - frame.top)
        parts.append(f'<rect class="since" x="{svg.number(x)}" y="{svg.number(frame.top)}" width="{width}" height="{height}"/>')
    low, high = frame.y_span
    y_ticks = log_ticks(low, high) if chart.log else ticks(low, high, 5 if frame.width == NARROW[0] else 7)
    labels, factor = (log_labels(y_ticks), "") if chart.log else tick_labels(y_ticks, chart.percent)
    x_ticks = ticks(*frame.x_span, 5 if frame.width == NARROW[0] else 8, whole=True)
    parts.append(frame.y_axis(y_ticks, labels, chart.baseline) + frame.x_axis(x_ticks, [f"{tick:g}" for tick in x_ticks]))
    parts.append(svg.text(frame.left - 14, frame.floor + 17, chart.x_label, "end") + (svg.text(4, frame.top - 8, factor, "start") if factor else ""))
    parts += [svg.line(frame.x(marker), frame.top, frame.x(marker), frame.floor, "marker") for marker in chart.markers]
    if chart.limit is not None and low <= chart.limit[0] <= high:
        y = frame.y(chart.limit[0])
        parts.append(svg.line(frame.left, y, frame.end, y, "limit"))
    return "".join(parts)


def _line(frame: svg.Frame, x: Sequence[float], series: Series, dots: bool = False) -> str:
    paths, points = "", ""
    for start, stop in svg.stretches(series.values):
        placed = [(frame.x(x[i]), frame.y(series.values[i])) for i in range(start, stop)]
        if len(placed) > 1:
            paths += svg.polyline(placed)
        if dots or len(placed) == 1:  # a lone value between gaps has no line
            points += "".join(svg.circle(*point, 3) for point in placed)
    return f'<g class="{series.look}">' + (f'<path class="line" d="{paths}"/>' if paths else "") + f"{points}</g>"


def _ribbon(frame: svg.Frame, x: Sequence[float], series: Series, kind: str) -> str:
    if not series.low or not series.high:
        return ""
    paths = ""
    for start, stop in svg.stretches(series.values, series.low, series.high):
        over = [(frame.x(x[i]), frame.y(series.high[i])) for i in range(start, stop)]
        under = [(frame.x(x[i]), frame.y(series.low[i])) for i in reversed(range(start, stop))]
        paths += svg.polyline(over + under) + "Z"
    return f'<g class="{series.look}"><path class="{kind}" d="{paths}"/></g>' if paths else ""


def _names(frame: svg.Frame, chart: Chart) -> str:
    """The series' names where their lines end, pushed apart where they would overlap."""
    ends = sorted(((frame.y(known(series.values)[-1]), series) for series in chart.series), key=lambda end: end[0])
    heights = svg.apart([y for y, _ in ends], 15, frame.top, frame.floor)
    return "".join(
        f'<g class="{series.look}">{svg.text(frame.end + 8, y + 4, _end_name(series), "start", "name")}</g>'
        for y, (_, series) in zip(heights, ends, strict=True)
    )


def _end_name(series: Series) -> str:
    return svg.cut(series.name, 20)


def _readable(chart: Chart, drawings: str) -> str:
    """The figure whose legend shows the values at the last x, or wherever the reader points."""
    readings = {"x": list(chart.x), "label": chart.x_label, "values": [[chart.show(value) for value in series.values] for series in chart.series]}
    entries = [legend_entry(one.name, one.look, one.note, shown[-1]) for one, shown in zip(chart.series, readings["values"], strict=True)]
    if chart.markers and chart.marker_name:
        entries.append(legend_entry(chart.marker_name, "marker"))
    if chart.limit is not None:
        entries.append(legend_entry(chart.limit[1], "limit"))
    if chart.since is not None and chart.since[1]:
        entries.append(legend_entry(chart.since[1], "since"))
    at = f'<span class="at">{escape(chart.x_label)} {chart.x[-1]:g}</span>'
    key = f'<div class="key"><ul class="legend">{"".join(entries)}</ul>{at}</div>'
    return figure(chart.title, chart.note, key + drawings + data(readings, "readings"), "chart readable", ' tabindex="0"')


# --- from the rows of metrics.jsonl ---------------------------------------------------------------------------------------
def column(rows: Rows, key: str) -> list[float | None]:
    """[epochs]; None where it is null, NaN or not recorded."""
    return [finite(row.get(key)) for row in rows]


def chart(rows: Rows, title: str, note: str, columns: Sequence[tuple[str, str]], **more: Any) -> Chart:
    """A chart over epochs of the columns (key, name)."""
    series = [Series(name, column(rows, key), look=look) for (key, name), look in zip(columns, PLAIN, strict=False)]
    return Chart(title, column(rows, "epoch"), series, note, **more)
