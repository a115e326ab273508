"""Several runs on one page: verdicts side by side, curves overlaid, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tdpo_cli.config.settings import Preset
from tdpo_cli.overoptimisation.verdict import standardised
from tdpo_cli.report.charts import OTHERS, Chart, Rows, Series, column, line_chart
from tdpo_cli.report.html import page
from tdpo_cli.report.numbers import signed_sd
from tdpo_cli.report.palette import mood

LOOKS = ("trained", *OTHERS, "gold")  # classes of page.css, by run
MOST_RUNS = len(LOOKS)
SD = "Change since epoch 0, in units of the run's own standard deviation at epoch 0."


@dataclass(frozen=True)
class Run:
    """What the page shows of one run."""

    name: str
    preset: Preset
    rows: Rows
    verdict: Mapping[str, Any]  # {"kind", "sentence", "since"}
    rises: Mapping[str, float | None]  # by reward, in units of epoch 0's std


def render(runs: Sequence[Run]) -> str:
    """The page that compares up to MOST_RUNS runs."""
    rewards = list(dict.fromkeys(name for run in runs for name in run.preset.rewards))
    charts = [_chart(runs, name, SD, lambda run, name=name: _change(run, name), baseline=0.0) for name in rewards]
    recorded = lambda key: lambda run: column(run.rows, key)
    update = [
        _chart(runs, "KL divergence of one update", "Between the policy before and after an epoch's update.", recorded("approx_kl")),
        _chart(runs, "Clipped ratios", "Share of the probability ratios outside the clip range.", recorded("policy_clip_fraction")),
    ]
    table = [
        [run.name, run.preset.algorithm.name, run.preset.trained_words, f"{len(run.rows)} of {run.preset.run.epochs}",
         *(signed_sd(run.rises.get(name)) for name in rewards)]
        for run in runs
    ]  # fmt: skip
    title = "tdpo: comparison of " + ", ".join(run.name for run in runs)
    return page("compare.html", title, runs=runs, rewards=rewards, table=table, mood=mood, charts=charts, update=update, settings=_settings(runs))


def _chart(runs: Sequence[Run], title: str, note: str, values: Callable[[Run], Sequence[float | None]], **more: Any) -> Markup:
    """One chart with a line per run over the epochs of them all."""
    x = list(range(max((row["epoch"] for run in runs for row in run.rows), default=0) + 1))
    series = []
    for run, look in zip(runs, LOOKS, strict=False):
        by_epoch = dict(zip((row["epoch"] for row in run.rows), values(run), strict=True))
        series.append(Series(run.name, [by_epoch.get(epoch) for epoch in x], look=look))
    return line_chart(Chart(title, x, series, note, **more))


def _change(run: Run, reward: str) -> list[float | None]:
    known = run.rows and reward in run.preset.rewards and run.rows[0]["epoch"] == 0
    return standardised(run.rows, [reward]) if known else [None] * len(run.rows)


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the settings that differ."""
    flat = [{f"{section}.{key}": value for section, keys in run.preset.as_dict().items() for key, value in keys.items()} for run in runs]
    return [
        [key, *(one if isinstance(one := values.get(key), str) else json.dumps(one) for values in flat)]
        for key in flat[0]
        if len({json.dumps(values.get(key), sort_keys=True) for values in flat}) > 1
    ]
