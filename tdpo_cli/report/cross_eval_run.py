"""One run of a cross-evaluation: every reward over its checkpoints, what it costs, win rates, agreement, diversity, peaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.report import intervals
from tdpo_cli.report.charts import Chart, Series, line_chart
from tdpo_cli.report.html import escape, table
from tdpo_cli.report.intervals import Row, Track, interval_chart, track_chart
from tdpo_cli.report.numbers import finite, share, short, signed
from tdpo_cli.report.palette import looks, role, training

Entry = Mapping[str, Any]
UNIT = "in units of the base's standard deviation; the base is 0"


def models_of(result: Mapping[str, Any], run: Entry) -> list[Entry]:
    """The entries of a run's checkpoints, in order."""
    by_name = {model["name"]: model for model in result["models"]}
    return [by_name[name] for name in run["models"] if name in by_name]


def render(result: Mapping[str, Any], run: Entry, level: str) -> str:
    """The section of a run; `level`: of the intervals, such as 95%."""
    models = models_of(result, run)
    trained = run["trained_reward"]
    x, x_label = _places(models)
    colours = looks(result["rewards"], trained)

    def lines(what: str) -> list[Series]:
        return [
            intervals.series(name, [model["rewards"][name][what] for model in models], colours[name], role(name, *training(run)))
            for name in result["rewards"]
        ]

    if len(models) == 1:
        return f"<div class=charts>{_one(result, models[0], colours, level)}</div>"
    standardised = Chart(
        "Change of every reward", x, lines("standardised"), f"Against the base, same prompts and noise, {UNIT}. Bands: {level} intervals.",
        x_label=x_label, baseline=0.0, dots=True, show=lambda value: "–" if value is None else f"{signed(value)} sd",
    )  # fmt: skip
    win_rates = Chart("Win rates", x, lines("win_rate"), "Share of images that score above the base's.", x_label=x_label, percent=True,
                      baseline=0.5, dots=True, show=share)  # fmt: skip
    small = [
        _tracks(result, run, models, colours),
        line_chart(win_rates),
        _agreement(models, x, x_label),
        _diversity(result, run, models, x, x_label),
        _shares(models, trained, x, x_label),
    ]
    return line_chart(standardised, wide=True) + f"<div class=charts>{''.join(small)}</div>" + _peaks(result, run, level)


def _places(models: Sequence[Entry]) -> tuple[list[float], str]:
    """Where checkpoints stand on the x axis: by epoch where all have one, else one after another."""
    epochs = [model["epoch"] for model in models]
    if None not in epochs and epochs == sorted(set(epochs)):
        return epochs, "epoch"
    return list(range(1, len(models) + 1)), "checkpoint"


def _one(result: Mapping[str, Any], model: Entry, colours: Mapping[str, str], level: str) -> str:
    def rows(what: str) -> list[Row]:
        cells = {name: intervals.interval(model["rewards"][name][what]) for name in result["rewards"]}
        return [Row(name, cell, colours[name]) for name, cell in cells.items() if cell is not None]

    charts = [
        interval_chart("Change of every reward", rows("standardised"), f"{model['name']}, {UNIT}. Whiskers: {level} intervals."),
        interval_chart("Win rates", rows("win_rate"), "Share of images that score above the base's.", baseline=0.5, percent=True),
    ]
    return "".join(charts)


def _tracks(result: Mapping[str, Any], run: Entry, models: Sequence[Entry], colours: Mapping[str, str]) -> str:
    trained, tracks = run["trained_reward"], []
    if trained not in result["rewards"]:
        return ""
    for name in result["rewards"]:
        pairs = [
            (intervals.interval(model["rewards"][trained]["standardised"]), intervals.interval(model["rewards"][name]["standardised"]))
            for model in models
        ]
        pairs = [pair for pair in pairs if None not in pair]
        if name != trained:
            tracks.append(Track(name, [x for x, _ in pairs], [y for _, y in pairs], colours[name], role(name, *training(run))))
    note = "From the base at 0 to the last checkpoint, the ring: a path that turns down trades the others for the trained reward."
    return track_chart(f"Others against {trained}", tracks, f"{trained}, sd", "others, sd", note)


def _diversity(result: Mapping[str, Any], run: Entry, models: Sequence[Entry], x: Sequence[float], x_label: str) -> str:
    base = next((model for model in result["models"] if model["name"] == run["base"]), None)
    before = intervals.mean(base["diversity"]) if base else None
    series = intervals.series("checkpoint", [model["diversity"] for model in models], "p1", "")
    return line_chart(Chart(
        "Diversity", x, [series], "How unlike the images of one prompt are: mean cosine distance of their embeddings.", x_label=x_label, dots=True,
        baseline=before, limit=None if before is None else (before, f"base {short(before)}"),
    ))  # fmt: skip


def _agreement(models: Sequence[Entry], x: Sequence[float], x_label: str) -> str:
    cells = [model.get("agreement") for model in models]  # an older file has none
    before = next((intervals.mean(cell["base"]) for cell in cells if cell), None)
    if before is None:
        return ""
    series = intervals.series("checkpoint", [cell and cell["model"] for cell in cells], "p1", "")
    return line_chart(Chart(
        "Agreement", x, [series],
        "How alike the trained and the other learned rewards rank the images of one prompt. Where one of them is exploited, they disagree.",
        x_label=x_label, dots=True, baseline=before, limit=(before, f"base {short(before)}"),
    ))  # fmt: skip


def _shares(models: Sequence[Entry], trained: str | None, x: Sequence[float], x_label: str) -> str:
    columns = [("prompts_all_rise", "all rewards rise", "p1"), ("prompts_trained_rises_others_fall", f"{trained} rises, others fall", "p2")]
    series = [Series(name, [finite(model[key]) for model in models], look=look) for key, name, look in columns]
    return line_chart(Chart("Prompts", x, series, "Share of the prompts.", x_label=x_label, percent=True, zero=True, dots=True, show=share))


def _peaks(result: Mapping[str, Any], run: Entry, level: str) -> str:
    rows = []
    for name in result["rewards"]:
        peak = run["peak_to_final"].get(name)
        if peak:
            at = "" if peak["peak_epoch"] is None else f" <small>at epoch {peak['peak_epoch']}</small>"
            rows.append([escape(name), signed(finite(peak["peak"])) + at, signed(finite(peak["final"])), intervals.with_bounds(peak["drop"])])
    note = f"Drop: paired over prompts, with {level} interval. The peak is the highest of several noisy numbers, so the drop leans upwards."
    shown = table(("reward", "peak", "last", "drop"), rows, f"{run['run']}: peak and last checkpoint")
    return f"{shown}<p class=note>{note}</p>" if rows else ""
