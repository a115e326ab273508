"""cross_eval.png: the page's own charts as an image, drawn by the page's stylesheet in its light colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tdpo_cli.report import charts, cross_eval_page
from tdpo_cli.report import cross_eval_tables as tables
from tdpo_cli.report.charts import WIDE, Chart, Series
from tdpo_cli.report.html import TEMPLATES
from tdpo_cli.report.numbers import known

SCALE, SMOOTH = 2, 2  # pixels per unit of a drawing; drawn this much larger and then reduced
HEADING = 56  # units above every drawing
# characters that Pillow's own font lacks
PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")
Point = tuple[float, float]
Style = Mapping[str, str]
Place = tuple[str, set[str]]  # tag and classes of an element


def cross_eval(result: Mapping[str, Any]) -> bytes:
    """The PNG of a cross_eval.json's content: a chart per run, or, of base models alone, a chart per reward."""
    drawn = [(tables.title(run), cross_eval_page.main_chart(result, run)) for run in result["runs"]]
    drawn = drawn or [(reward, _of_bases(result, reward)) for reward in result["rewards"]]
    drawn = [(title, chart) for title, chart in drawn if any(known(series.values) for series in chart.series)]
    picture = Image.new("RGB", (WIDE[0] * SCALE, max(1, len(drawn)) * (WIDE[1] + HEADING) * SCALE), "white")
    for i, (title, chart) in enumerate(drawn):
        picture.paste(_panel(title, chart.note, charts.draw(chart, WIDE, "wide")), (0, i * (WIDE[1] + HEADING) * SCALE))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _of_bases(result: Mapping[str, Any], reward: str) -> Chart:
    cells = [model["rewards"][reward] for model in result["models"]]
    means, stds = [cell["mean"] for cell in cells], [cell["std"] or 0.0 for cell in cells]
    ends = [[None if mean is None else mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (-1, 1)]
    return Chart(reward, range(1, len(cells) + 1), [Series("mean ± std", means, *ends)], "Scores of the base models.", "base", dots=True)


def _panel(title: str, note: str, svg: str) -> Image.Image:
    """A drawing below its title and note."""
    size = SCALE * SMOOTH
    canvas = Image.new("RGB", (WIDE[0] * size, (WIDE[1] + HEADING) * size), "white")
    pen = ImageDraw.Draw(canvas, "RGBA")
    rules = _rules()
    root = next(declared for selector, declared in rules if selector == [":root"])
    pen.text((14 * size, 12 * size), title, root["--ink"], _font(17 * size))
    pen.text((14 * size, 36 * size), note, root["--soft"], _font(12 * size))
    for element, style in _styled(ElementTree.fromstring(svg), [("figure", {"chart"})], root, rules):
        _draw(pen, element, style, size)
    return canvas.resize((WIDE[0] * SCALE, (WIDE[1] + HEADING) * SCALE), Image.Resampling.LANCZOS)


# --- the stylesheet -----------------------------------------------------------------------------------------------------------
def _rules() -> list[tuple[list[str], Style]]:
    """(parts of a selector, declarations) of page.css, without what is inside an @media."""
    css = re.sub(r"/\*.*?\*/|@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}", "", TEMPLATES["page.css"], flags=re.S)
    declared = lambda body: dict(re.findall(r"([\w-]+)\s*:\s*([^;]+?)\s*;", body + ";"))
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", css)
    return [(selector.split(), declared(body)) for selectors, body in rules for selector in selectors.split(",")]


def _styled(element: Any, above: Sequence[Place], inherited: Style, rules: Sequence[tuple[list[str], Style]]) -> Iterator[tuple[Any, Style]]:
    """The elements of a drawing in their order, each with its declarations."""
    path = [*above, (element.tag, set(element.get("class", "").split()))]
    style = {key: value for key, value in inherited.items() if key != "opacity"}
    for selector, declared in rules:
        style |= declared if _matches(selector, path) else {}
    yield element, style
    for child in element:
        yield from _styled(child, path, style, rules)


def _matches(selector: Sequence[str], path: Sequence[Place]) -> bool:
    """Whether the parts of `.a b.c` are found on the way to an element, the last at the element itself."""
    fits = lambda part, place: part.split(".")[0] in ("", place[0]) and set(part.split(".")[1:]) <= place[1]
    above = iter(path[:-1])
    return fits(selector[-1], path[-1]) and all(any(fits(part, place) for place in above) for part in selector[:-1])


def _colour(style: Style, key: str) -> tuple[int, int, int, int] | None:
    value = style.get(key, "none")
    while value.startswith("var("):
        value = style[value[4:-1]]
    if value == "none":
        return None
    return (*bytes.fromhex(value.removeprefix("#")), round(255 * float(style.get("opacity", 1))))


# --- shapes -----------------------------------------------------------------------------------------------------------------------
def _draw(pen: ImageDraw.ImageDraw, element: Any, style: Style, size: float) -> None:
    at = lambda x, y: (float(element.get(x)) * size, (float(element.get(y)) + HEADING) * size)
    fill, stroke, width = _colour(style, "fill"), _colour(style, "stroke"), round(float(style.get("stroke-width", 1)) * size)
    if element.tag == "text":
        words = (element.text or "").replace("×10", "e").translate(PLAIN)
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[element.get("text-anchor")]
        pen.text(at("x", "y"), words, fill, _font(float(style["font-size"].removesuffix("px")) * size), anchor)
    elif element.tag == "circle":
        (x, y), radius = at("cx", "cy"), float(element.get("r")) * size
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    elif element.tag == "rect":
        (x, y), wide, high = at("x", "y"), float(element.get("width")) * size, float(element.get("height")) * size
        pen.rectangle((x, y, x + wide, y + high), fill)
    elif element.tag in ("line", "path"):
        for points in [[at("x1", "y1"), at("x2", "y2")]] if element.tag == "line" else _points(element.get("d"), size):
            if fill is not None and len(points) > 2:
                pen.polygon(points, fill)
            elif stroke is not None and stroke[3]:
                lengths = [float(length) * size for length in style.get("stroke-dasharray", "").split()]
                for piece in _dashes(points, *lengths) if lengths else [points]:
                    pen.line(piece, stroke, width, "curve")


def _points(path: str, size: float) -> Iterator[list[Point]]:
    for stretch in path.split("M")[1:]:
        pairs = [point.split(",") for point in stretch.removesuffix("Z").split("L")]
        yield [(float(x) * size, (float(y) + HEADING) * size) for x, y in pairs]


def _dashes(points: Sequence[Point], dash: float, gap: float) -> Iterator[list[Point]]:
    """The parts of a line that are drawn."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    for start in np.arange(0.0, along[-1], dash + gap):
        ends = np.minimum([start, start + dash], along[-1])
        yield list(zip(*(np.interp(ends, along, column) for column in np.transpose(points)), strict=True))


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
