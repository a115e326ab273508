"""A cross-evaluation's numbers as rows: cross_eval.csv, the Markdown of cross_eval.md, and what a terminal shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.console import Console, significant
from tdpo_cli.rewards import short_name

Result = Mapping[str, Any]
COLUMNS = ("model", "base", "run", "epoch", "algorithm", "trained_reward", "reward_queries", "updates")
ESTIMATES = ("difference", "standardised", "win_rate")


# --- numbers ------------------------------------------------------------------------------------------------------------
def interval(one: Mapping[str, float | None] | None, digits: int = 2) -> str:
    """+1.10 [0.98, 1.21]"""
    if one is None or one["mean"] is None:
        return "-"
    return f"{one['mean']:+.{digits}f}" + ("" if one["low"] is None else f" [{one['low']:+.{digits}f}, {one['high']:+.{digits}f}]")


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


# --- cross_eval.csv -----------------------------------------------------------------------------------------------------
def as_csv(result: Result) -> str:
    """One row per model and reward; a missing value is an empty field."""
    parts = ("mean", "low", "high")
    header = [*COLUMNS, "reward", "mean", "std", *(f"{name}_{part}" for name in ESTIMATES for part in parts)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for model in result["models"]:
        for reward, numbers in model["rewards"].items():
            estimates = [(numbers[name] or {}).get(part) for name in ESTIMATES for part in parts]
            writer.writerow([model["name"], *(model[column] for column in COLUMNS[1:]), reward, numbers["mean"], numbers["std"], *estimates])
    return buffer.getvalue()


# --- tables -------------------------------------------------------------------------------------------------------------
def bases(result: Result) -> tuple[list[str], list[list[str]]]:
    """What 0 and 1 of the common scale are: the base's mean and standard deviation, raw."""
    models = [model for model in result["models"] if model["base"] is None]
    rows = []
    for model in models:
        for reward, numbers in model["rewards"].items():
            row = [short_name(reward), significant(numbers["mean"], 4), significant(numbers["std"], 4)]
            rows.append([model["name"], *row] if len(models) > 1 else row)
    return ([*(["model"] if len(models) > 1 else []), "reward", "mean", "std"], rows)


def of_run(result: Result, run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Checkpoint by checkpoint: every reward on the common scale."""
    rows = [[_epoch(model), *(interval(model["rewards"][name]["standardised"]) for name in result["rewards"])] for model in models_of(result, run)]
    return ["epoch", *map(short_name, result["rewards"])], rows


def of_prompts(result: Result, run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Checkpoint by checkpoint: how often the trained reward beats the base, what happens prompt by prompt, diversity and agreement."""
    rows = []
    for model in models_of(result, run):
        trained = model["rewards"].get(model["trained_reward"])
        rows.append([
            _epoch(model), share(trained["win_rate"]["mean"]) if trained else "-", share(model["prompts_all_rise"]),
            share(model["prompts_trained_rises_others_fall"]), interval(model["diversity_difference"], 3),
            interval((model.get("agreement") or {}).get("change")),
        ])  # fmt: skip
    return ["epoch", "trained wins", "all rise", "at their cost", "diversity", "agreement"], rows


def of_peaks(result: Result, run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for reward, one in run["peak_to_final"].items():
        epoch = "-" if one["peak_epoch"] is None else str(one["peak_epoch"])
        rows.append([short_name(reward), epoch, _signed(one["peak"]), _signed(one["final"]), interval(one["drop"])])
    return ["reward", "peak epoch", "peak", "final", "drop"], rows


def of_matrix(result: Result) -> tuple[list[str], list[list[str]]]:
    matrix = result["matrix"]
    rows = [[name, *map(interval, numbers)] for name, numbers in zip(matrix["trained"], matrix["standardised"], strict=True)]
    return ["run", *map(short_name, matrix["evaluated"])], rows


def title(run: Mapping[str, Any]) -> str:
    how = f": {run['algorithm']} on {run['trained_reward']}" if run["algorithm"] else ""
    return f"{run['run']}{how}"


def models_of(result: Result, run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a run's checkpoints, in order."""
    return [model for model in result["models"] if model["name"] in run["models"]]


def _epoch(model: Mapping[str, Any]) -> str:
    return "-" if model["epoch"] is None else str(model["epoch"])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


# --- cross_eval.md ------------------------------------------------------------------------------------------------------
SCALE = "Paired differences to the base model on the same prompts and noise, in units of the base's standard deviation: the base is 0."


def as_markdown(result: Result) -> str:
    count, level, resamples = len(result["prompts"]), f"{result['bootstrap']['level']:.0%}", f"{result['bootstrap']['resamples']:,}"
    lines = [
        "# Cross-evaluation", "",
        f"{count} prompts of `{result['prompt_source']}`, {result['per_prompt']} image(s) of each per model, seed {result['seed']}. {SCALE} "
        f"In brackets: {level} bootstrap intervals, prompts resampled {resamples} times.", "",
    ]  # fmt: skip
    lines += [f"- **{title(run)}** - {run['verdict']['sentence']}" for run in result["runs"]] + [""]
    if len(result["runs"]) > 1:
        lines += ["## Every run's last checkpoint", "", *markdown(*of_matrix(result)), ""]
    for run in result["runs"]:
        lines += [f"## {title(run)}", "", *markdown(*of_run(result, run)), ""]
        lines += ["Prompt by prompt, and the change of diversity and agreement:", "", *markdown(*of_prompts(result, run)), ""]
        lines += ["From each reward's peak to the last checkpoint:", "", *markdown(*of_peaks(result, run)), ""]
    lines += ["## The base model, raw", "", *markdown(*bases(result)), ""]
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows))]


# --- the terminal -------------------------------------------------------------------------------------------------------
def of_last(result: Result, run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The last checkpoint: every reward on the common scale, its win rate, and what it lost since its peak."""
    last, peaks = models_of(result, run)[-1], run["peak_to_final"]
    rows = []
    for name in result["rewards"]:
        reward, drop = last["rewards"][name], interval(peaks[name]["drop"]) if name in peaks else "-"
        rows.append([short_name(name), interval(reward["standardised"]), share((reward["win_rate"] or {}).get("mean")), drop])
    return ["reward", "change", "wins", "lost since its peak"], rows


def show(result: Result, console: Console) -> None:
    """Base model, last checkpoints and verdicts; the tables of all checkpoints are in cross_eval.md."""
    console.table(*bases(result), title="the base model, raw scale")
    if result["runs"]:
        level = f"{result['bootstrap']['level']:.0%}"
        console.say(f"\nPaired differences to the base, in its sd, with {level} intervals over prompts.")
        console.say("The tables of all checkpoints are in cross_eval.md.")
    for run in result["runs"]:
        console.say()
        console.table(*of_last(result, run), title=f"{title(run)}, {run['models'][-1].rpartition('/')[2]}")
    if result["runs"]:
        console.say()
        console.pairs([(run["run"], run["verdict"]["sentence"]) for run in result["runs"]], title="verdict on the last checkpoint")
