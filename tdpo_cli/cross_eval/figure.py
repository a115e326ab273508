"""Draw a cross-evaluation: every reward per checkpoint with its interval, and the cross-reward matrix of several runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tdpo_cli.overoptimisation.verdict import TRUE_REWARDS
from tdpo_cli.rewards import short_name

# Okabe & Ito's colours, told apart by everyone; a reward keeps its own in every figure
COLOURS = {
    "aesthetic": "#D55E00", "pickscore": "#0072B2", "hpsv2": "#009E73", "hpsv2.1": "#56B4E9", "imagereward": "#CC79A7", "gold": "#222222",
}  # fmt: skip
OTHER_COLOURS = ("#E69F00", "#7F7F7F", "#8C6D31", "#6B4C9A")
COLUMNS = 3  # panels in a row
PANEL = (5.0, 3.8)  # inches


def cross_eval(result: Mapping[str, Any]) -> bytes:
    """The PNG of a cross_eval.json's content."""
    runs, several = result["runs"], len(result["runs"]) > 1
    count = len(runs) or len(result["rewards"])
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    widest = max(len(str(name)) for name in (*result["matrix"]["trained"], ""))
    size = (max(columns * PANEL[0], 1.4 * len(result["rewards"]) + 0.09 * widest + 2 if several else 0), rows * PANEL[1] + 0.3)
    tail = 0.38 * len(runs) + 1.3 if several else 0.0  # inches of the matrix
    # a Figure of its own, not pyplot's: no display is looked for, and no state stays
    figure = Figure(figsize=(size[0], size[1] + tail), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels, below = figure.subfigures(2, 1, height_ratios=[size[1], tail]) if several else (figure, None)
    axes = panels.subplots(rows, columns, squeeze=False, sharey=bool(runs)).flatten()
    for ax in axes[count:]:
        ax.remove()
    if runs:
        for ax, run in zip(axes, runs, strict=False):
            _run(ax, result, run)
        axes[0].set_ylabel("change from the base (base's sd)")
        handles = {label: handle for ax in axes[:count] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        ncols = min(3 * columns, len(handles))
        panels.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    else:
        for ax, reward in zip(axes, result["rewards"], strict=False):
            _spread(ax, result, reward)
    if below is not None:
        _matrix(below.subplots(), result["matrix"])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _run(ax: Axes, result: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """One panel: the base at 0 queries, then every checkpoint; the trained reward thick, the truth dashed."""
    models = [model for model in result["models"] if model["name"] in run["models"]]
    known = all(model["reward_queries"] is not None for model in models)
    x = [0.0, *(float(model["reward_queries"]) if known else i + 1.0 for i, model in enumerate(models))]
    for name in result["rewards"]:
        estimates = [model["rewards"][name]["standardised"] for model in models]
        mean, low, high = (np.array([0.0, *(np.nan if one[part] is None else one[part] for one in estimates)]) for part in ("mean", "low", "high"))
        label = short_name(name) + (" (true reward)" if name in TRUE_REWARDS else "")
        trained, true, colour = name == run["trained_reward"], name in TRUE_REWARDS, colour_of(name, result["rewards"])
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(
            x, mean, color=colour, linewidth=3.0 if trained else 1.4, linestyle="--" if true else "-",
            marker="o", markersize=4.5 if trained else 2.5, label=label, zorder=3 if trained else 2,
        )  # fmt: skip
    ax.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    how = f"{run['algorithm']} on {run['trained_reward']}" if run["algorithm"] else "trained elsewhere"
    ax.set_title(f"{run['run']}\n{how}", fontsize=10)
    ax.set_xlabel("reward queries" if known else "checkpoint")
    _plain(ax)


def _spread(ax: Axes, result: Mapping[str, Any], reward: str) -> None:
    """Base models alone: a histogram of the raw scores."""
    for model in result["models"]:
        scores = [score for row in model["scores"][reward] for score in row if score is not None]
        ax.hist(scores, bins=20, color=colour_of(reward, result["rewards"]), alpha=0.7, label=model["name"])
    ax.set_title(reward, fontsize=10)
    ax.set_xlabel("score")
    _plain(ax)


def _matrix(ax: Axes, matrix: Mapping[str, Any]) -> None:
    """Rows: what was trained; columns: what judges; cells: the last checkpoint's change, bold where the interval is free of 0."""
    cells = matrix["standardised"]
    means = np.array([[np.nan if one["mean"] is None else one["mean"] for one in row] for row in cells], dtype=float)
    limit = max(1e-9, float(np.nanmax(np.abs(means)))) if np.isfinite(means).any() else 1.0
    ax.imshow(means, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(matrix["evaluated"])), matrix["evaluated"], fontsize=9)
    ax.set_yticks(range(len(matrix["trained"])), matrix["trained"], fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for i, row in enumerate(cells):
        for j, one in enumerate(row):
            if one["mean"] is None:
                continue
            clear = one["low"] is not None and (one["low"] > 0 or one["high"] < 0)
            look = {"color": "white" if abs(one["mean"]) > 0.6 * limit else "black", "weight": "bold" if clear else "normal"}
            ax.text(j, i, f"{one['mean']:+.2f}", ha="center", va="center", fontsize=9, **look)
    ax.set_title("last checkpoint of every run, change from the base (base's sd); bold: the interval is free of 0", fontsize=10)
    ax.spines[:].set_visible(False)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.2)
    ax.tick_params(labelsize=9)


def colour_of(reward: str, rewards: Sequence[str]) -> str:
    others = [name for name in rewards if name not in COLOURS]
    return COLOURS.get(reward) or OTHER_COLOURS[others.index(reward) % len(OTHER_COLOURS)]
