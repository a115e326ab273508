"""Line charts over epochs: a description, its drawing as SVG, and a figure whose legend can be read off epoch by epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from tdpo_cli.report import html, svg
from tdpo_cli.report.numbers import finite, known, short, tick_labels, ticks

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
    note: str = ""  # follows the name in the legend


@dataclass(frozen=True)
class Chart:
    """What is drawn. NaN and infinity count as missing."""

    title: str
    x: Sequence[float]  # ascending
    series: Sequence[Series]
    note: str = ""  # a sentence below the title
    x_label: str = "epoch"
    percent: bool = False
    zero: bool = False  # the y axis reaches 0
    baseline: float | None = None  # a stronger horizontal line
    limit: tuple[float, str] | None = None  # a dotted horizontal line and its name; a far one is not drawn, because it would flatten the lines
    markers: Sequence[float] = ()  # vertical dotted lines
    marker_name: str = ""
    since: tuple[float, str] | None = None  # shaded from here on, and why; without a why the legend is silent
    show: Callable[[float | None], str] = short  # a value in the legend
    dots: bool = False  # a dot at every value


def line_chart(chart: Chart, wide: bool = False) -> Markup:
    """A figure; `wide` adds a second drawing for broad screens, with names at the ends of the lines. Nothing without values."""
    chart = _cleaned(chart)
    if not any(known(series.values) for series in chart.series):
        return Markup()
    if not any(value for series in chart.series for value in (*known(series.values), *known(series.low), *known(series.high))):
        return html.part("flat", chart.title, chart.note, chart.x_label)
    drawing = draw(chart, NARROW, "narrow") + draw(chart, WIDE, "wide") if wide else draw(chart)
    values = [[chart.show(value) for value in series.values] for series in chart.series]
    legend = [(one.name, one.look, one.note, shown[-1]) for one, shown in zip(chart.series, values, strict=True)]
    more = [(chart.marker_name if chart.markers else "", "marker"), ((chart.limit or ("", ""))[1], "limit"), ((chart.since or ("", ""))[1], "since")]
    legend += [(name, look, "", None) for name, look in more if name]
    readings = {"x": list(chart.x), "label": chart.x_label, "values": values}
    return html.part("chart", chart.title, chart.note, legend, f"{chart.x_label} {chart.x[-1]:g}", drawing, readings)


def draw(chart: Chart, size: tuple[float, float] = NARROW, kind: str = "") -> Markup:
    """The SVG; as `wide` with the series' names at the ends of their lines."""
    chart, names = _cleaned(chart), kind == "wide"
    frame = _frame(chart, size, 22 + 7.4 * max(len(_end_name(series)) for series in chart.series) if names else 14)
    # with a single x, values stand side by side around it
    shifts = [24 * (i - (len(chart.series) - 1) / 2) if len(chart.x) == 1 else 0.0 for i in range(len(chart.series))]
    # the trained reward is drawn last, on top
    order = sorted(zip(chart.series, shifts, strict=True), key=lambda pair: pair[0].look == "trained")
    lines = [_line(frame, chart, series, shift) for series, shift in order]
    shapes = [_grid(frame, chart), *(_band(frame, chart.x, series) for series in chart.series), *lines, _names(frame, chart) if names else ""]
    shapes.append(svg.line(frame.left, frame.top, frame.left, frame.floor, "cursor"))
    low, high = frame.x_span
    ends = f'data-left="{svg.number(frame.left)}" data-right="{svg.number(frame.end)}" data-low="{low:g}" data-high="{high:g}"'
    head = f'<svg class="{kind}" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(chart.title)}" {ends}>'
    return Markup(head + "".join(shapes) + "</svg>")


# --- parts --------------------------------------------------------------------------------------------------------------
def _cleaned(chart: Chart) -> Chart:
    fine = lambda values: list(map(finite, values))
    series = [dataclasses.replace(one, values=fine(one.values), low=fine(one.low), high=fine(one.high)) for one in chart.series]
    return dataclasses.replace(chart, series=[one for one in series if known(one.values)])


def _frame(chart: Chart, size: tuple[float, float], right: float) -> svg.Frame:
    values = [value for series in chart.series for part in (series.values, series.low, series.high) for value in known(part)]
    values += [] if chart.baseline is None else [chart.baseline]
    first, last = chart.x[0], chart.x[-1]
    x_span = (first, last) if first < last else (first - 0.5, last + 0.5)
    return svg.Frame(*size, 54, right, 20, 22, x_span, svg.span(values, chart.zero))


def _grid(frame: svg.Frame, chart: Chart) -> str:
    parts, few = [], frame.width == NARROW[0]
    if chart.since is not None and chart.since[0] <= frame.x_span[1]:
        x = max(frame.left, frame.x(chart.since[0]))
        width, height = svg.number(frame.end - x), svg.number(frame.floor - frame.top)
        parts.append(f'<rect class="since" x="{svg.number(x)}" y="{svg.number(frame.top)}" width="{width}" height="{height}"/>')
    low, high = frame.y_span
    y_ticks = ticks(low, high, 5 if few else 7)
    labels, factor = tick_labels(y_ticks, chart.percent)
    for y, tick, label in zip(map(frame.y, y_ticks), y_ticks, labels, strict=True):
        parts.append(svg.line(frame.left, y, frame.end, y, "base" if tick == chart.baseline else "grid"))
        parts.append(svg.text(frame.left - 7, y + 4, label, "end"))
    for tick in ticks(*frame.x_span, 5 if few else 8, whole=True):
        x = frame.x(tick)
        parts.append(svg.line(x, frame.floor, x, frame.floor + 4, "grid") + svg.text(x, frame.floor + 17, f"{tick:g}", "middle"))
    parts.append(svg.text(frame.left - 14, frame.floor + 17, chart.x_label, "end") + (svg.text(4, frame.top - 8, factor, "start") if factor else ""))
    parts += [svg.line(frame.x(marker), frame.top, frame.x(marker), frame.floor, "marker") for marker in chart.markers]
    if chart.limit is not None and low <= chart.limit[0] <= high:
        y = frame.y(chart.limit[0])
        parts.append(svg.line(frame.left, y, frame.end, y, "limit"))
    return "".join(parts)


def _line(frame: svg.Frame, chart: Chart, series: Series, shift: float) -> str:
    paths, points = "", ""
    for start, stop in svg.stretches(series.values):
        placed = [(frame.x(chart.x[i]) + shift, frame.y(series.values[i])) for i in range(start, stop)]
        if len(placed) > 1:
            paths += svg.polyline(placed)
        if chart.dots or len(placed) == 1:  # a lone value between gaps has no line
            points += "".join(svg.circle(*point, 3) for point in placed)
        if len(placed) == 1 and series.low and None not in (series.low[start], series.high[start]):  # and no band
            points += svg.line(placed[0][0], frame.y(series.low[start]), placed[0][0], frame.y(series.high[start]), "whisker")
    return svg.group(series.look, (f'<path class="line" d="{paths}"/>' if paths else "") + points)


def _band(frame: svg.Frame, x: Sequence[float], series: Series) -> str:
    paths = ""
    for start, stop in svg.stretches(series.values, series.low, series.high) if series.low and series.high else ():
        over = [(frame.x(x[i]), frame.y(series.high[i])) for i in range(start, stop)]
        under = [(frame.x(x[i]), frame.y(series.low[i])) for i in reversed(range(start, stop))]
        paths += svg.polyline(over + under) + "Z"
    return svg.group(series.look, f'<path class="band" d="{paths}"/>') if paths else ""


def _names(frame: svg.Frame, chart: Chart) -> str:
    """The series' names where their lines end, pushed apart where they would overlap."""
    ends = sorted(((frame.y(known(series.values)[-1]), series) for series in chart.series), key=lambda end: end[0])
    heights = svg.apart([y for y, _ in ends], 15, frame.top, frame.floor)
    names = [(series.look, svg.text(frame.end + 8, y + 4, _end_name(series), "start", "name")) for y, (_, series) in zip(heights, ends, strict=True)]
    return "".join(svg.group(*name) for name in names)


def _end_name(series: Series) -> str:
    return series.name if len(series.name) <= 20 else series.name[:19] + "…"


# --- from the rows of metrics.jsonl ---------------------------------------------------------------------------------------
def column(rows: Rows, key: str) -> list[float | None]:
    """[epochs]; None where it is null, NaN or not recorded."""
    return [finite(row.get(key)) for row in rows]
