"""The page of a cross-evaluation, drawn from cross_eval.json and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.report import cross_eval_run, gallery, intervals
from tdpo_cli.report.charts import OTHERS
from tdpo_cli.report.cross_eval_run import UNIT, models_of
from tdpo_cli.report.html import escape, facts, folded, page, section, table
from tdpo_cli.report.intervals import Track, track_chart
from tdpo_cli.report.numbers import change, finite, share, short, signed
from tdpo_cli.report.palette import TRUE_REWARD, training, verdict_box

Entry = Mapping[str, Any]


def render(result: Mapping[str, Any], folder: Path) -> str:
    """The whole page. `result`: the content of cross_eval.json; `folder`: where its images/ lie."""
    runs = result["runs"]
    name = folder.resolve().name
    level = f"{100 * result['bootstrap']['level']:g}%"
    pictures = section("Pictures", gallery.render(result, folder), "The same prompt and the same noise: only the weights differ.")
    body = [
        _header(name, result, runs),
        section("Runs compared", _compared(result), f"The last checkpoint of every run, change against its base {UNIT}. Below: {level} intervals."),
        *([pictures] if len(runs) > 1 else []),
        *(section(run["run"], cross_eval_run.render(result, run, level), _about(run)) for run in runs),
        *([pictures] if len(runs) < 2 else []),
        section("Numbers", _numbers(result, level)),
        _footer(result, level),
    ]
    return page(f"{name} - tdpo cross-eval", "\n".join(body))


def _footer(result: Mapping[str, Any], level: str) -> str:
    return (
        f"<footer><p>Intervals: {level} bootstrap over prompts, {result['bootstrap']['resamples']:,} resamples; differences are paired, "
        "image by image. Win rate: share of images above the base's image of the same prompt and noise, ties count half. "
        f"Made by tdpo {escape(result['tdpo'])} from cross_eval.json and images/.</p></footer>"
    )


def _header(name: str, result: Mapping[str, Any], runs: Sequence[Entry]) -> str:
    judged = [verdict_box(run["verdict"]["sentence"], run["verdict"]["kind"]) for run in runs]
    heads = [f"<h3>{escape(run['run'])} <small>{escape(_about(run))}</small></h3>" for run in runs]
    boxes = "".join(f"<div>{head}{box}</div>" for head, box in zip(heads, judged, strict=True))
    pairs = [
        ("prompts", f"{len(result['prompts'])} from {result['prompt_source']}"), ("images per prompt", result["per_prompt"]),
        ("rewards", ", ".join(result["rewards"])), ("models", len(result["models"])), ("seed", result["seed"]),
    ]  # fmt: skip
    return f'<header><p class=eyebrow>tdpo cross-evaluation</p><h1>{escape(name)}</h1><div class="runs">{boxes}</div>{facts(pairs)}</header>'


def _about(run: Entry) -> str:
    count = len(run["models"])
    parts = [(run["algorithm"] or "").upper(), f"trained on {run['trained_reward']}" if run["trained_reward"] else ""]
    return ", ".join([*filter(None, parts), f"{count} checkpoint{'s' if count > 1 else ''}"])


# --- several runs ---------------------------------------------------------------------------------------------------------
def _compared(result: Mapping[str, Any]) -> str:
    if len(result["runs"]) < 2:
        return ""
    return f'{_matrix(result)}<div class="charts single">{_all_tracks(result)}</div>'


def _matrix(result: Mapping[str, Any]) -> str:
    """Runs by rewards; colour is the change, an outline the reward that the run was trained on."""
    matrix, runs = result["matrix"], {run["run"]: run for run in result["runs"]}
    largest = max((abs(value) for row in matrix["standardised"] for cell in row if (value := intervals.mean(cell)) is not None), default=0) or 1.0
    rows = []
    for name, cells in zip(matrix["trained"], matrix["standardised"], strict=True):
        trained = runs[name]["trained_reward"] if name in runs else None
        own = training(runs[name])[0] if name in runs else ()
        shown = [_heat(cell, largest, reward in own) for reward, cell in zip(matrix["evaluated"], cells, strict=True)]
        rows.append([f"{escape(name)} <small>{escape(trained or '')}</small>", *shown])
    legend = "<p class=note>Outlined: the reward a run was trained on." + (
        f" {TRUE_REWARD}: the true reward, never read by the verdict.</p>" if TRUE_REWARD in matrix["evaluated"] else "</p>"
    )
    return table(("run", *matrix["evaluated"]), rows, "Cross-reward matrix", "matrix") + legend


def _heat(cell: Entry | None, largest: float, own: bool) -> str:
    mean = intervals.mean(cell)
    if mean is None:
        return "–"
    tone = "up" if mean >= 0 else "down"
    words = f"{signed(mean)}<small>{intervals.bounds(cell)}</small>"
    return f'<span class="heat {tone}{" own" if own else ""}" style="--v:{abs(mean) / largest:.3f}">{words}</span>'


def _all_tracks(result: Mapping[str, Any]) -> str:
    tracks = []
    for number, run in enumerate(result["runs"]):
        points = [point for model in models_of(result, run) if (point := _place(result, model, run))]
        x, y = ([(value, value, value) for value in values] for values in (zip(*points, strict=True) if points else ((), ())))
        tracks.append(Track(run["run"], x, y, OTHERS[number % len(OTHERS)], run["trained_reward"] or "", str(number + 1)))
    note = "Every run starts as its base, at 0: to the right the trained reward, upwards the mean of the other learned ones, a ring where it ends."
    return track_chart("What the trained reward costs the others", tracks, "trained reward, sd", "others, sd", note)


def _place(result: Mapping[str, Any], model: Mapping[str, Any], run: Entry) -> tuple[float, float] | None:
    """(trained reward, mean of the learned ones that took no part in training) on the common scale; None where one is missing."""
    weights, constraints = run.get("trained_weights") or {run["trained_reward"]: 1.0}, run.get("constraints", [])
    means = {name: intervals.mean(model["rewards"][name]["standardised"]) for name in result["rewards"]}
    others = [mean for name, mean in means.items() if name not in (*weights, *constraints, TRUE_REWARD)]
    trained = [means.get(name) for name in weights]
    if not others or None in (*trained, *others):
        return None
    mine = sum(weight * value for weight, value in zip(weights.values(), trained, strict=True)) / sum(weights.values())
    return mine, sum(others) / len(others)


# --- tables ---------------------------------------------------------------------------------------------------------------
def _numbers(result: Mapping[str, Any], level: str) -> str:
    rewards, models = result["rewards"], result["models"]
    compared = [model for model in models if model["base"] is not None]

    def every(what: str, write: Any) -> list[list[str]]:
        return [[escape(model["name"]), *(write(model["rewards"][name][what]) for name in rewards)] for model in compared]

    def with_std(cell: Entry) -> str:
        return f"{short(finite(cell['mean']))} <small>± {short(finite(cell['std']), 2)}</small>"

    raw = [[escape(model["name"]), *(with_std(model["rewards"][name]) for name in rewards)] for model in models]
    other = [
        [escape(model["name"]), f"{model['reward_queries'] or 0:,}", f"{model['updates'] or 0:,}", intervals.with_bounds(model["diversity"], short),
         share(finite(model["prompts_all_rise"])), share(finite(model["prompts_trained_rises_others_fall"])),
         intervals.with_bounds((model.get("agreement") or {}).get("change"))]
        for model in models
    ]  # fmt: skip
    head = ("model", *rewards)
    parts = [folded("Scores <small>mean ± standard deviation over images</small>", table(head, raw, "Scores"))]
    if compared:
        parts += [
            folded(f"Change in units of the base's standard deviation <small>{level} intervals</small>",
                   table(head, every("standardised", intervals.with_bounds), "Standardised change")),
            folded(f"Change on the rewards' own scales <small>{level} intervals</small>",
                   table(head, every("difference", lambda cell: intervals.with_bounds(cell, change)), "Change")),
            folded(f"Win rates <small>{level} intervals</small>",
                   table(head, every("win_rate", lambda cell: intervals.with_bounds(cell, share)), "Win rates")),
        ]  # fmt: skip
    columns = ("model", "reward queries", "updates", "diversity", "all rewards rise", "trained rises, others fall", "change of agreement")
    parts.append(folded("Diversity, prompts, agreement and cost", table(columns, other, "Diversity, prompts, agreement and cost")))
    return "".join(parts)
