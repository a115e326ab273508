"""The report of a run: is the reward being over-optimised, what became of the pictures, and how healthy the training was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from markupsafe import Markup

from tdpo_cli.config.settings import Preset, describe
from tdpo_cli.console import duration
from tdpo_cli.report import health, previews
from tdpo_cli.report.charts import Chart, Rows, Series, column, line_chart
from tdpo_cli.report.html import page
from tdpo_cli.report.numbers import finite, known, short, signed_sd, spread
from tdpo_cli.report.palette import looks, mood, role
from tdpo_cli.storage.run_dir import RunDir

MOST_POINTS = 1000  # epochs drawn; of longer runs every n-th


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
    preset, name = run.read_preset(), folder.resolve().name
    drawn = [rows[i] for i in spread(range(len(rows)), MOST_POINTS)]
    resets = [row["epoch"] for row in rows if finite(row.get("reset"))]
    lines = [_standardised(drawn, reward, preset) for reward in dict.fromkeys((preset.trained, *preset.rewards))] if rows else []
    return page(
        "run.html", f"{name} - tdpo", name=name, rows=rows, preset=preset, verdict=verdict, mood=mood(verdict.kind), facts=_facts(preset, rows),
        cautions=health.skipped_steps(rows), thinned=len(drawn) if len(drawn) < len(rows) else None,
        common_scale=_common_scale(drawn, lines, verdict), unknown=[series.name for series in lines if not known(series.values)],
        rewards=_rewards(rows, preset, rises) if rows else [], strip=previews.strip(folder),
        raw=[_raw(drawn, reward, preset, verdict) for reward in preset.rewards], policy=health.policy(drawn, preset),
        critic=health.critic(drawn, resets, preset), resets=health.resets_in_words(preset, resets), resources=health.resources(drawn),
        settings=_settings(preset), environment=_environment(run.read_environments()),
    )  # fmt: skip


def _facts(preset: Preset, rows: Rows) -> list[tuple[str, object]]:
    done = f"{len(rows)} of {preset.run.epochs}" + ("" if len(rows) >= preset.run.epochs else " so far")
    return [
        ("algorithm", preset.algorithm.name.upper()),
        ("trained reward", preset.trained_words),
        *([("constraints", preset.constraints_words)] if preset.reward.at_least else []),
        ("base model", preset.model.base),
        ("epochs", done),
        ("reward queries", f"{rows[-1].get('reward_queries') or 0:,}" if rows else "0"),
        ("seed", preset.run.seed),
        ("time", duration(sum(known(column(rows, "seconds/total"))))),
        *([("checkpoints", "hold a moving average of the weights; rewards are of the weights themselves")] if preset.update.ema_decay > 0 else []),
    ]


# --- rewards ------------------------------------------------------------------------------------------------------------
def _common_scale(rows: Rows, lines: Sequence[Series], verdict: Verdict) -> Markup:
    return line_chart(Chart(
        "All rewards on a common scale", column(rows, "epoch"), lines,
        note="Rise since epoch 0, in units of epoch 0's standard deviation. Bands: ±1 standard error of the epoch's mean.",
        baseline=0.0, since=_since(verdict), show=signed_sd,
    ), wide=True)  # fmt: skip


def _standardised(rows: Rows, name: str, preset: Preset) -> Series:
    """Changes since epoch 0 in units of its std; without values where epoch 0 has no mean or no spread."""
    start, spread = finite(rows[0].get(f"rewards/{name}/mean")), finite(rows[0].get(f"rewards/{name}/std"))
    if start is None or not spread or rows[0]["epoch"] != 0:
        return Series(name, [None] * len(rows))
    return _reward(rows, name, preset, start, spread, name, _role(name, preset))


def _raw(rows: Rows, name: str, preset: Preset, verdict: Verdict) -> Markup:
    label = "trained" if name in preset.weights else "watched"
    series = _reward(rows, name, preset, 0.0, 1.0, label, role(name, (), preset.reward.at_least))
    return line_chart(Chart(name, column(rows, "epoch"), [series], since=_since(verdict, said=False)))


def _reward(rows: Rows, name: str, preset: Preset, start: float, unit: float, label: str, note: str) -> Series:
    """(mean - start) / unit with a band of one standard error of the epoch's mean."""
    root = math.sqrt(preset.rollout.samples_per_epoch)
    values = [None if mean is None else (mean - start) / unit for mean in column(rows, f"rewards/{name}/mean")]
    errors = [None if std is None else std / root / unit for std in column(rows, f"rewards/{name}/std")]
    pairs = [(None, None) if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in zip(values, errors, strict=True)]
    return Series(label, values, *zip(*pairs, strict=True), looks(preset.rewards, preset.trained)[name], note)


def _rewards(rows: Rows, preset: Preset, rises: Mapping[str, float | None]) -> list[Sequence[Any]]:
    """Cells of the table: name, rise, first and last mean, highest."""
    cells = []
    for name in dict.fromkeys((preset.trained, *preset.rewards)):
        means = column(rows, f"rewards/{name}/mean")
        best = max(((value, row["epoch"]) for value, row in zip(means, rows, strict=True) if value is not None), default=None)
        highest = "–" if best is None else (short(best[0]), f"at epoch {best[1]}")
        rise = Markup("<b>{}</b>").format(signed_sd(rises.get(name)))
        cells.append(((name, _role(name, preset)), rise, short(means[0]), short(means[-1]), highest))
    return cells


def _role(name: str, preset: Preset) -> str:
    return role(name, (preset.trained, *preset.weights), preset.reward.at_least)


def _since(verdict: Verdict, said: bool = True) -> tuple[float, str] | None:
    return None if verdict.since is None else (verdict.since, f"{verdict.kind} since epoch {verdict.since}" if said else "")


# --- what the run folder records ------------------------------------------------------------------------------------------
def _settings(preset: Preset) -> list[list[str]]:
    """Rows of the settings that differ from the defaults: key with its meaning, value, default."""
    now, default = preset.as_dict(), Preset().as_dict()
    return [
        [Markup("{}<small>{}</small>").format(key, meaning), _setting(now[section][name]), _setting(default[section][name])]
        for key, _, _, meaning in describe()
        for section, _, name in [key.partition(".")]
        if now[section][name] != default[section][name]
    ]


def _setting(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "not set" if value is None else "empty" if value == "" else "none"
    if isinstance(value, (list, dict)):
        return ", ".join(map(str, value)) if isinstance(value, list) else ", ".join(f"{name} = {path}" for name, path in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _environment(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of env.json: a key, and its value at every start."""
    flat = [{**entry, **(entry.get("versions") or {})} for entry in entries]
    keys = [key for key in dict.fromkeys(key for entry in flat for key in entry) if key != "versions"]
    return [[key, *(_setting(entry.get(key)) for entry in flat)] for key in keys]
