"""The report of a run: is the reward being over-optimised, what became of the pictures, and how healthy the training was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tdpo_cli import __version__
from tdpo_cli.config.preset import Preset
from tdpo_cli.console import duration
from tdpo_cli.report import health, previews, tables
from tdpo_cli.report.charts import Chart, Rows, Series, column, line_chart
from tdpo_cli.report.html import escape, facts, page, section, table
from tdpo_cli.report.numbers import finite, known, short, signed, spread
from tdpo_cli.report.palette import looks, role, verdict_box
from tdpo_cli.storage.run_dir import RunDir

MOST_POINTS = 1000  # epochs drawn; of longer runs every n-th
PREVIEWS = "Fixed prompts and noise, sampled apart from training: from epoch to epoch only the policy changes."


class Verdict(Protocol):
    """What the page needs of it."""

    kind: str  # over-optimising, declining, stalled, improving, ...
    sentence: str
    since: int | None  # the epoch since when it is so


def render(folder: Path, rows: Rows, verdict: Verdict, rises: Mapping[str, float | None]) -> str:
    """The page of a run folder, also of one that is still being written.

    `rows`: its metrics so far. `rises`: by reward, last fifth against first fifth of the epochs in units of epoch 0's std.
    Raises RequestError if there is no run or a file of it is damaged.
    """
    run = RunDir(folder)
    preset = run.read_preset()
    name = folder.resolve().name
    drawn = [rows[i] for i in spread(range(len(rows)), MOST_POINTS)]
    body = [
        _header(name, preset, rows, verdict),
        section("Rewards", _rewards(drawn, rows, preset, verdict, rises), _thinned(drawn, rows)),
        section("Pictures", previews.render(folder, preset.run.preview_images), PREVIEWS),
        section("Each reward on its own scale", _raw(drawn, preset, verdict)),
        section("Policy", health.policy(drawn, preset)),
        section("Critic", health.critic(drawn, rows, preset)),
        section("Time and memory", health.resources(drawn)),
        section("Settings", tables.settings(preset), "Highlighted: what differs from the defaults."),
        section("Environment", tables.environment(run.read_environments()), "One entry per start or resume."),
        section("Numbers", tables.numbers(rows)),
        f"<footer><p>Made by tdpo {escape(__version__)} from metrics.jsonl, preset.json, env.json and images/ of the run folder.</p></footer>",
    ]
    return page(f"{name} - tdpo", "\n".join(body))


# --- the top ------------------------------------------------------------------------------------------------------------
def _header(name: str, preset: Preset, rows: Rows, verdict: Verdict) -> str:
    seconds = sum(known(column(rows, "seconds/total")))
    done = f"{len(rows)} of {preset.run.epochs}" + ("" if len(rows) >= preset.run.epochs else " so far")
    pairs = [
        ("algorithm", preset.algorithm.name.upper()),
        ("trained reward", preset.trained_words),
        *([("constraints", preset.constraints_words)] if preset.reward.at_least else []),
        ("base model", preset.model.base),
        ("epochs", done),
        ("reward queries", f"{rows[-1].get('reward_queries') or 0:,}" if rows else "0"),
        ("seed", preset.run.seed),
        ("time", duration(seconds)),
        *([("checkpoints", "hold a moving average of the weights; rewards are of the weights themselves")] if preset.update.ema_decay > 0 else []),
    ]
    judged = verdict_box(verdict.sentence, verdict.kind)
    return f"<header><p class=eyebrow>tdpo run report</p><h1>{escape(name)}</h1>{judged}{facts(pairs)}{_warnings(rows)}</header>"


def _warnings(rows: Rows) -> str:
    said = []
    for key, what in (("skipped_steps", "skipped for a non-finite loss or gradient"), ("overflowed_steps", "skipped while the loss scale adapted")):
        epochs = [(row["epoch"], row[key]) for row in rows if finite(row.get(key))]
        if epochs:
            shown = ", ".join(f"{epoch}" for epoch, _ in epochs[:12]) + (", …" if len(epochs) > 12 else "")
            said.append(f"<p class=caution>Optimizer steps {what}: {sum(count for _, count in epochs):g}, in epoch {shown}.</p>")
    return "".join(said)


def _thinned(drawn: Rows, rows: Rows) -> str:
    return "" if len(drawn) == len(rows) else f"The charts of this page draw {len(drawn):,} of {len(rows):,} epochs, evenly spaced."


# --- rewards ------------------------------------------------------------------------------------------------------------
def _rewards(drawn: Rows, rows: Rows, preset: Preset, verdict: Verdict, rises: Mapping[str, float | None]) -> str:
    if not rows:
        return "<p>There will be curves once an epoch is finished.</p>"
    lines = [_standardised(drawn, name, preset) for name in dict.fromkeys((preset.trained, *preset.rewards))]
    chart = Chart(
        "All rewards on a common scale", column(drawn, "epoch"), lines,
        note="Rise since epoch 0, in units of epoch 0's standard deviation. Bands: ±1 standard error of the epoch's mean.",
        baseline=0.0, since=_since(verdict), show=lambda value: "–" if value is None else f"{signed(value)} sd",
    )  # fmt: skip
    unknown = [name for name in preset.rewards if not known(_standardised(drawn, name, preset).values)]
    missing = f"<p class=note>Not drawn, because epoch 0 has no mean or no spread: {escape(', '.join(unknown))}.</p>" if unknown else ""
    return line_chart(chart, wide=True) + missing + _table_of_rewards(rows, preset, rises)


def _standardised(rows: Rows, name: str, preset: Preset) -> Series:
    """Changes since epoch 0 in units of its std; without values where epoch 0 has no mean or no spread."""
    start, spread = finite(rows[0].get(f"rewards/{name}/mean")), finite(rows[0].get(f"rewards/{name}/std"))
    if start is None or not spread or rows[0]["epoch"] != 0:
        return Series(name, [None] * len(rows))
    return _reward(rows, name, preset, start, spread, name, _role(name, preset))


def _raw(rows: Rows, preset: Preset, verdict: Verdict) -> str:
    charts = []
    for name in preset.rewards:
        label = "trained" if name in preset.weights else "watched"
        series = _reward(rows, name, preset, 0.0, 1.0, label, role(name, (), preset.reward.at_least))
        charts.append(line_chart(Chart(name, column(rows, "epoch"), [series], since=_since(verdict, said=False))))
    note = f"Mean of the epoch's {preset.rollout.samples_per_epoch:,} training samples. Band: ±1 standard error, std/√n."
    return f"<p class=lead>{escape(note)}</p><div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _reward(rows: Rows, name: str, preset: Preset, start: float, unit: float, label: str, note: str) -> Series:
    """(mean - start) / unit with a band of one standard error of the epoch's mean."""
    root = math.sqrt(preset.rollout.samples_per_epoch)
    values = [None if mean is None else (mean - start) / unit for mean in column(rows, f"rewards/{name}/mean")]
    errors = [None if std is None else std / root / unit for std in column(rows, f"rewards/{name}/std")]
    pairs = [(None, None) if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in zip(values, errors, strict=True)]
    return Series(label, values, *zip(*pairs, strict=True), looks(preset.rewards, preset.trained)[name], note)


def _table_of_rewards(rows: Rows, preset: Preset, rises: Mapping[str, float | None]) -> str:
    cells = []
    for name in dict.fromkeys((preset.trained, *preset.rewards)):
        means = column(rows, f"rewards/{name}/mean")
        best = max(((value, row["epoch"]) for value, row in zip(means, rows, strict=True) if value is not None), default=None)
        highest = "–" if best is None else f"{short(best[0])} <small>at epoch {best[1]}</small>"
        rise = f"{signed(rises[name])} sd" if rises.get(name) is not None else "–"
        cells.append((f"{escape(name)} <small>{escape(_role(name, preset))}</small>", f"<b>{rise}</b>", short(means[0]), short(means[-1]), highest))
    head = ("reward", "rise", f"epoch {rows[0]['epoch']}", f"epoch {rows[-1]['epoch']}", "highest")
    note = "Rise: mean of the last fifth of the epochs minus mean of the first fifth, divided by epoch 0's standard deviation."
    return table(head, cells, "Rewards") + f"<p class=note>{note}</p>"


def _role(name: str, preset: Preset) -> str:
    return role(name, (preset.trained, *preset.weights), preset.reward.at_least)


def _since(verdict: Verdict, said: bool = True) -> tuple[float, str] | None:
    return None if verdict.since is None else (verdict.since, f"{verdict.kind} since epoch {verdict.since}" if said else "")
