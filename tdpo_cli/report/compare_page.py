"""Several runs on one page: verdicts side by side, curves overlaid, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo_cli import __version__
from tdpo_cli.config.preset import Preset
from tdpo_cli.overoptimisation.verdict import standardised
from tdpo_cli.report.charts import Chart, Rows, Series, line_chart
from tdpo_cli.report.html import escape, page, section, table
from tdpo_cli.report.numbers import finite, signed
from tdpo_cli.report.palette import verdict_box

LOOKS = ("trained", "s1", "s2", "s3", "s4", "s5", "s6", "gold")  # classes of page.css, by run
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
    health = [
        _chart(runs, "KL divergence of one update", "Between the policy before and after an epoch's update.", lambda run: _column(run, "approx_kl")),
        _chart(runs, "Clipped ratios", "Share of the probability ratios outside the clip range.", lambda run: _column(run, "policy_clip_fraction")),
    ]
    body = [
        f"<header><p class=eyebrow>tdpo comparison</p><h1>{len(runs)} runs</h1></header>",
        section("Verdicts", _verdicts(runs, rewards)),
        section("Rewards", f"<div class=charts>{''.join(charts)}</div>"),
        section("Update", f"<div class=charts>{''.join(health)}</div>"),
        section("Settings that differ", _settings(runs)),
        f"<footer><p>Made by tdpo {escape(__version__)} from the metrics.jsonl and preset.json of each run.</p></footer>",
    ]
    return page("tdpo: comparison of " + ", ".join(run.name for run in runs), "\n".join(body))


def _verdicts(runs: Sequence[Run], rewards: Sequence[str]) -> str:
    rows = []
    for run in runs:
        epochs = f"{len(run.rows)} of {run.preset.run.epochs}"
        rises = ["–" if run.rises.get(name) is None else f"{signed(run.rises[name])} sd" for name in rewards]
        rows.append([escape(run.name), escape(run.preset.algorithm.name), escape(run.preset.trained_words), epochs, *rises])
    said = "".join(verdict_box(f"{run.name}: {run.verdict['sentence']}", run.verdict["kind"]) for run in runs)
    note = "Rise: mean of the last fifth of the epochs minus mean of the first fifth, in units of epoch 0's standard deviation."
    return said + table(("run", "algorithm", "trained", "epochs", *rewards), rows, "Rises") + f"<p class=note>{note}</p>"


def _chart(runs: Sequence[Run], title: str, note: str, values: Any, **more: Any) -> str:
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


def _column(run: Run, key: str) -> list[float | None]:
    return [finite(row.get(key)) for row in run.rows]


def _settings(runs: Sequence[Run]) -> str:
    flat = [{f"{section}.{key}": value for section, keys in run.preset.as_dict().items() for key, value in keys.items()} for run in runs]
    rows = [
        [escape(key), *(escape(one if isinstance(one := values.get(key), str) else json.dumps(one)) for values in flat)]
        for key in flat[0]
        if len({json.dumps(values.get(key), sort_keys=True) for values in flat}) > 1
    ]
    return table(("setting", *(run.name for run in runs)), rows, "Settings that differ", "settings") if rows else "<p>None.</p>"
