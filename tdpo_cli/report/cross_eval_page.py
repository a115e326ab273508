"""The page of a cross-evaluation, drawn from cross_eval.json and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tdpo_cli.report import cross_eval_tables as tables
from tdpo_cli.report.charts import Chart, Series, line_chart
from tdpo_cli.report.gallery import gallery
from tdpo_cli.report.html import page
from tdpo_cli.report.numbers import finite, share, short, signed_sd
from tdpo_cli.report.palette import TRUE_REWARD, looks, mood, role, training

Entry = Mapping[str, Any]
UNIT = "in units of the base's standard deviation; the base is 0"
TABLES = (
    ("Change against the base, by checkpoint", tables.of_run),
    ("Prompt by prompt, and the change of diversity and agreement", tables.of_prompts),
    ("From each reward's peak to the last checkpoint", tables.of_peaks),
)


def render(result: Mapping[str, Any], folder: Path) -> str:
    """The whole page. `result`: the content of cross_eval.json; `folder`: where its images/ are."""
    name, level = folder.resolve().name, f"{100 * result['bootstrap']['level']:g}%"
    facts = [
        ("prompts", f"{len(result['prompts'])} from {result['prompt_source']}"), ("images per prompt", result["per_prompt"]),
        ("rewards", ", ".join(result["rewards"])), ("models", len(result["models"])), ("seed", result["seed"]),
    ]  # fmt: skip
    runs = [
        {
            "name": run["run"], "about": _about(run), "verdict": run["verdict"]["sentence"], "mood": mood(run["verdict"]["kind"]),
            "main": line_chart(main_chart(result, run), wide=True), "charts": _charts(result, run),
            "tables": [(label, table(result, run)) for label, table in TABLES],
        }
        for run in result["runs"]
    ]  # fmt: skip
    return page(
        "cross_eval.html", f"{name} - tdpo cross-eval", name=name, level=level, facts=facts, runs=runs, matrix=_matrix(result), result=result,
        unit=UNIT, true_reward=TRUE_REWARD, pictures=gallery(result, folder), bases=tables.bases(result),
    )  # fmt: skip


def main_chart(result: Mapping[str, Any], run: Entry) -> Chart:
    """Every reward over the checkpoints of a run."""
    note = f"Against the base, same prompts and noise, {UNIT}. Bands: {100 * result['bootstrap']['level']:g}% intervals."
    x, x_label = _places(tables.models_of(result, run))
    return Chart("Change of every reward", x, _lines(result, run, "standardised"), note, x_label, baseline=0.0, dots=True, show=signed_sd)


def _about(run: Entry) -> str:
    count = len(run["models"])
    parts = [(run["algorithm"] or "").upper(), f"trained on {run['trained_reward']}" if run["trained_reward"] else ""]
    return ", ".join([*filter(None, parts), f"{count} checkpoint{'s' if count > 1 else ''}"])


def _matrix(result: Mapping[str, Any]) -> list[list[Any]]:
    """A row per run: its name and trained reward, then cells. `v`: the change as a share of the largest; `own`: the run was trained on it."""
    matrix, runs = result["matrix"], {run["run"]: run for run in result["runs"]}
    largest = max((abs(cell["mean"]) for row in matrix["standardised"] for cell in row if _mean(cell) is not None), default=0) or 1.0
    rows = []
    for name, cells in zip(matrix["trained"], matrix["standardised"], strict=True):
        own = training(runs[name])[0]
        shown = [
            None if _mean(cell) is None else {**cell, "v": f"{abs(cell['mean']) / largest:.3f}", "own": reward in own}
            for reward, cell in zip(matrix["evaluated"], cells, strict=True)
        ]
        rows.append([(name, runs[name]["trained_reward"]), *shown])
    return rows


# --- the charts of a run ----------------------------------------------------------------------------------------------------
def _charts(result: Mapping[str, Any], run: Entry) -> list[Markup]:
    models = tables.models_of(result, run)
    x, x_label = _places(models)
    base = next((model for model in result["models"] if model["name"] == run["base"]), {})
    cells = [model.get("agreement") or {} for model in models]  # an older file has none
    shares = {"prompts_all_rise": "all rewards rise", "prompts_trained_rises_others_fall": f"{run['trained_reward']} rises, others fall"}

    def chart(title: str, note: str, series: Sequence[Series], **more: Any) -> Markup:
        return line_chart(Chart(title, x, series, note, x_label, dots=True, **more))

    def against(before: float | None) -> dict[str, Any]:
        return {"baseline": before, "limit": None if before is None else (before, f"base {short(before)}")}

    return [
        chart("Win rates", "Share of images that score above the base's.", _lines(result, run, "win_rate"), percent=True, baseline=0.5, show=share),
        chart("Agreement", "How alike the trained and the other learned rewards rank the images of one prompt. Where one of them is exploited, they "
              "disagree.", [_estimates("checkpoint", [cell.get("model") for cell in cells])], **against(_mean((cells or [{}])[0].get("base")))),
        chart("Diversity", "How unlike the images of one prompt are: mean cosine distance of their embeddings.",
              [_estimates("checkpoint", [model["diversity"] for model in models])], **against(_mean(base.get("diversity")))),
        chart("Prompts", "Share of the prompts.", [Series(name, [finite(model[key]) for model in models], look=look)
              for (key, name), look in zip(shares.items(), ("p1", "p2"), strict=True)], percent=True, zero=True, show=share),
    ]  # fmt: skip


def _lines(result: Mapping[str, Any], run: Entry, what: str) -> list[Series]:
    """A line per reward over the checkpoints of a run."""
    colours, models = looks(result["rewards"], run["trained_reward"]), tables.models_of(result, run)
    cells = {name: [model["rewards"][name][what] for model in models] for name in result["rewards"]}
    return [_estimates(name, cells[name], colours[name], role(name, *training(run))) for name in result["rewards"]]


def _places(models: Sequence[Entry]) -> tuple[list[float], str]:
    """Where checkpoints are on the x axis: by epoch where all have one, else one after another."""
    epochs = [model["epoch"] for model in models]
    if None not in epochs and epochs == sorted(set(epochs)):
        return epochs, "epoch"
    return list(range(1, len(models) + 1)), "checkpoint"


def _estimates(name: str, cells: Sequence[Entry | None], look: str = "p1", note: str = "") -> Series:
    """A line of {"mean", "low", "high"}, each of which may be null."""
    return Series(name, *([None if cell is None else finite(cell.get(key)) for cell in cells] for key in ("mean", "low", "high")), look, note)


def _mean(cell: Entry | None) -> float | None:
    return None if cell is None else finite(cell.get("mean"))
