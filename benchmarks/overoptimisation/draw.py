"""Redraw every figure and table of the study from its result files, in seconds:

    python benchmarks/overoptimisation/draw.py

writes docs/overoptimisation/*.png and docs/overoptimisation/tables.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import analysis
import arms
import matplotlib
import run as runner
from analysis import AXES, GOLD, PROXY, Run

from tdpo_cli.overoptimisation import verdict

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OUT = Path(__file__).parents[2] / "docs" / "overoptimisation"
COLOURS = {"ddpo": "#0072b2", "ddpo-all-timesteps": "#56b4e9", "tdpo": "#e69f00", "tdpo-r": "#d55e00"}  # Okabe and Ito's
WATCHED = ("pickscore", "hpsv2", "imagereward")
LEVELS = {
    "queries": (960, 1920, 2880 - 48 * (verdict.WINDOW // 2)),  # the last that averages of WINDOW epochs reach
    "steps": (100, 400, 800, 1160),
    "KL": (0.25, 0.5, 1.0, 2.0, 4.0),
    "proxy": (5.25, 5.5, 5.75, 6.0, 6.25, 6.5),
}
SAME = 0.005  # of gold: a narrower interval is of runs that have hardly parted
KINDS = ("over-optimising", "declining", "doubtful", "stalled", "improving", "unclear")  # of verdicts
PAIRS = (("tdpo-r", "tdpo"), ("tdpo", "ddpo"), ("tdpo-r", "ddpo"), ("ddpo-all-timesteps", "ddpo"))


# --- figures ----------------------------------------------------------------------------------------------------------------
def band(axes: plt.Axes, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Mean over seeds with its 95 % interval."""
    found = [analysis.interval(values) for values in zip(*curves, strict=True)]
    if None in found:
        axes.plot(x, curves[0], color=colour, label=f"{label} (1 seed)")
        return
    axes.plot(x, [i.mean for i in found], color=colour, label=label)
    axes.fill_between(x, [i.mean - i.half for i in found], [i.mean + i.half for i in found], color=colour, alpha=0.15, linewidth=0)


def over(axes: plt.Axes, runs: Sequence[Run], names: Sequence[str], axis: str, column: str, colours: Sequence[str]) -> None:
    for name, colour in zip(names, colours, strict=True):
        mine = list(analysis.of(runs, name).values())
        if mine:
            band(axes, mine[0].smooth(AXES[axis]), [run.smooth(column) for run in mine], colour, name)


def against(axes: plt.Axes, runs: Sequence[Run], names: Sequence[str], axis: str, colours: Sequence[str]) -> None:
    """Gold along proxy or KL: every seed a thin line, thick the mean at equal levels that all seeds reach."""
    for name, colour in zip(names, colours, strict=True):
        mine = list(analysis.of(runs, name).values())
        if not mine:
            continue
        for run in mine:
            axes.plot(run.smooth(AXES[axis]), run.smooth(GOLD), color=colour, alpha=0.25, linewidth=0.8)
        low, high = max(min(run.smooth(AXES[axis])) for run in mine), min(max(run.smooth(AXES[axis])) for run in mine)
        levels = [low + (high - low) * i / 30 for i in range(30)]
        means = [[run.at(axis, level) for run in mine] for level in levels]
        axes.plot(levels, [sum(found) / len(found) for found in means], color=colour, linewidth=2, label=name)


def figure(name: str, panels: Sequence[tuple[str, str, Callable[[plt.Axes], None]]]) -> None:
    """panels: (x label, y label, what draws it)"""
    width = 2 if len(panels) in (2, 4) else len(panels)
    rows = -(-len(panels) // width)
    page, grid = plt.subplots(rows, width, figsize=(4.6 * width, 3.3 * rows), squeeze=False, constrained_layout=True)
    for axes, (x, y, draw) in zip(grid.flat, panels, strict=True):
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(frameon=False, fontsize=8)
    page.savefig(OUT / name, dpi=130)
    plt.close(page)


def figures(main: Sequence[Run], variants: Sequence[Run]) -> None:
    names, colours = list(COLOURS), list(COLOURS.values())
    draw = lambda axis, column: lambda axes: over(axes, main, names, axis, column, colours)
    figure("queries.png", [
        ("reward queries", "proxy (aesthetic)", draw("queries", PROXY)), ("reward queries", "gold (the truth)", draw("queries", GOLD)),
        ("optimizer steps", "gold (the truth)", draw("steps", GOLD)), ("reward queries", "KL to the base model", draw("queries", "mean_kl")),
    ])  # fmt: skip
    figure("gold.png", [
        ("proxy (aesthetic)", "gold (the truth)", lambda axes: against(axes, main, names, "proxy", colours)),
        ("KL to the base model", "gold (the truth)", lambda axes: against(axes, main, names, "KL", colours)),
    ])  # fmt: skip
    figure("watched.png", [("reward queries", name, draw("queries", f"rewards/{name}/mean")) for name in WATCHED])
    groups = {
        "which neurons": ["tdpo", "tdpo-r", "reset-all", "reset-dormant"],
        "how often": ["tdpo", "tdpo-r", "reset-every-2", "reset-every-5", "reset-every-20"],
        "the critic": ["tdpo", "tdpo-r", "tdpo-relu", "tdpo-r-relu", "tdpo-4-critic-steps", "tdpo-r-4-critic-steps"],
    }
    shades = ["#e69f00", "#d55e00", "#009e73", "#0072b2", "#cc79a7", "#999999"]

    def panel(members: list[str]) -> Callable[[plt.Axes], None]:
        whole = [name for name in members if len(analysis.of([*main, *variants], name)) == len(arms.SEEDS)]  # means of other seeds do not compare

        def onto(axes: plt.Axes) -> None:
            against(axes, [*main, *variants], whole, "proxy", shades[: len(whole)])
            axes.legend(frameon=False, fontsize=7)

        return onto

    if variants:
        figure("variants.png", [("proxy (aesthetic)", f"gold: {title}", panel(members)) for title, members in groups.items()])


# --- tables -----------------------------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines) + "\n"


def counted(interval: analysis.Interval | None) -> str | None:
    return None if interval is None else f"{interval} (n={interval.count})"


def plain(values: Sequence[float]) -> str:
    """A mean over seeds with its interval, without a sign."""
    found = analysis.interval(values)
    return f"{values[0]:.3f} (1 seed)" if found is None else f"{found.mean:.3f} ± {found.half:.3f}"


def pilot_table(pilot: Sequence[Run]) -> str:
    def final(arm: str, rate: float) -> str:
        found = [run for run in pilot if run.arm == arm and run.rate == rate]
        if not found:
            return "-"
        last, worst = found[0].columns[PROXY][-(arms.PILOT_EPOCHS // 5) :], max(found[0].columns["approx_kl"])
        return f"{sum(last) / len(last):.3f} ({worst:.1g}{', breaks' if worst > arms.HEALTHY else ''})"

    chosen = runner.rates()
    rows = [[arm, *(final(arm, rate) for rate in arms.GRID), f"{chosen[arm]:g}"] for arm in arms.METHODS]
    return table(["method", *(f"{rate:g}" for rate in arms.GRID), "chosen"], rows)


def outcome_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        mine = list(analysis.of(runs, name).values())
        if not mine:
            continue
        peaks = [analysis.peak_and_fall(run) for run in mine]
        rows.append([
            name, len(mine), mine[0].columns["updates"][-1], plain([run.smooth(PROXY)[-1] for run in mine]), plain([p for p, _ in peaks]),
            plain([last for _, last in peaks]), plain([p - last for p, last in peaks]), plain([run.smooth("mean_kl")[-1] for run in mine]),
            explained(mine, slice(0, 20)), explained(mine, slice(-20, None)),
        ])  # fmt: skip
    head = ["arm", "seeds", "optimizer steps", "proxy, end", "gold, peak", "gold, end", "gold's fall, peak to end", "KL, end"]
    return table([*head, "critic explains, first 20 epochs", "last 20"], rows)


def explained(runs: Sequence[Run], epochs: slice) -> str | None:
    """Share of the returns' variance that the critic explains, mean over epochs and seeds; None without a critic."""
    values = [value for run in runs for value in run.columns["critic_explained_variance"][epochs] if value is not None]
    return f"{sum(values) / len(values):.1%}" if values else None


def difference_table(runs: Sequence[Run], pairs: Sequence[tuple[str, str]], column: str = GOLD) -> str:
    rows = []
    for axis, levels in LEVELS.items():
        for level in levels if AXES[axis] != column else ():
            found = [analysis.difference(runs, a, b, axis, level, column) for a, b in pairs]
            if any(found):
                rows.append([f"{axis} {level:g}", *map(counted, found)])
    return table(["at equal", *(f"{a} minus {b}" for a, b in pairs)], rows)


def variant_table(runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> str:
    """Every variant against its method, and every way to reset against none, where it matters most."""
    places = [
        ("queries", LEVELS["queries"][0], PROXY),
        ("queries", LEVELS["queries"][-1], PROXY),
        ("queries", LEVELS["queries"][-1], GOLD),
        ("KL", 2.0, GOLD),
        ("proxy", 6.25, GOLD),
    ]
    rows = []
    for arm, other in pairs:
        found = [analysis.difference(runs, arm, other, axis, level, column) for axis, level, column in places]
        rows.append([f"{arm} minus {other}", *map(counted, found)])
    names = {PROXY: "proxy", GOLD: "gold"}
    return table(["", *(f"{names[column]} at {axis} {level:g}" for axis, level, column in places)], rows)


def outside(runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> str:
    """How many of gold's intervals, over all pairs and levels, exclude 0; pairs that are still nearly the same run have no say."""
    found = [(pair, analysis.difference(runs, *pair, axis, level)) for pair in pairs for axis, levels in LEVELS.items() for level in levels]
    moved = [(pair, one) for pair, one in found if one and one.half > SAME]
    without = [" minus ".join(pair) for pair, one in moved if abs(one.mean) > one.half]
    each = ", ".join(f"{without.count(name)} of {name}" for name in dict.fromkeys(without))
    return (
        f"Of {len(moved)} intervals of gold's differences (those above and of the ways to reset against tdpo; wider than {SAME}) {len(without)} "
        f"exclude 0 ({each}); by chance alone one in twenty would: {len(moved) / 20:.0f}.\n"
    )


def verdict_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        found = analysis.judge(run)
        rows.append([found.arm, found.seed, found.gold_peak, found.gold_seen, found.kind, found.since, found.first])
    return table(["arm", "seed", "gold's peak", "its fall is significant after", "verdict at the end", "since", "first warning after"], rows)


def verdict_counts(runs: Sequence[Run]) -> str:
    """The verdict at every run's end against what gold has done, counted; and how far apart in time."""
    found = [analysis.judge(run) for run in runs]
    rows = []
    for title, group in (("fell", [j for j in found if j.gold_peak is not None]), ("did not fall", [j for j in found if j.gold_peak is None])):
        rows.append([title, len(group), *(sum(j.kind == kind for j in group) for kind in KINDS)])
    lines = [table(["gold, by the end of the run", "runs", *KINDS], rows)]
    fell = [j for j in found if j.gold_peak is not None]
    off = sorted(j.since - j.gold_peak for j in fell if j.kind in analysis.WARNINGS)
    late = sorted(j.first - j.gold_seen for j in fell if j.first is not None and j.gold_seen is not None)
    spread = lambda values: f"{values[len(values) // 2]:+d} (median; {values[0]:+d} to {values[-1]:+d}; {len(values)} runs)"
    if off:
        lines.append(f"- turning point that a warning names, minus gold's peak, in epochs: {spread(off)}")
    if late:
        lines.append(f"- first warning minus the epoch at which gold itself, read by the same rule, shows its fall: {spread(late)}")
    return "\n".join(lines) + "\n"


def held_out_tables(found: dict[str, Any]) -> str:
    """The sentence of a cross-evaluation against gold on the same held-out images: counted, then run by run."""
    cell = lambda one: f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
    fate = lambda one: "rose" if one["low"] > 0 else "fell" if one["high"] < 0 else "not resolved"
    by_fate: dict[str, list[str]] = {"fell": [], "not resolved": [], "rose": []}
    rows = []
    for run in found["runs"]:
        kind, gold, agreement = run["verdict"]["kind"], run["gold"][-1], run["agreement"]
        by_fate[fate(gold)].append(kind)
        alike = f"{agreement['base']['mean']:.2f} -> {agreement['model']['mean']:.2f}"
        changes = [cell(run["since_base"][name]) for name in ("trained", "others")]
        rows.append([run["arm"], run["seed"], *changes, alike, kind, cell(gold), cell(run["gold_drop"]["drop"])])
    fates = [[name, len(group), *(group.count(kind) for kind in KINDS)] for name, group in by_fate.items()]
    gold = {(run["arm"], run["seed"]): run["gold"][-1]["mean"] for run in found["runs"]}
    pairs = [[f"{a} minus {b}", analysis.interval([gold[a, seed] - gold[b, seed] for seed in arms.SEEDS])] for a, b in PAIRS]
    head = ["arm", "seed", "proxy", "others", "agreement", "verdict", "gold", "gold's fall, best to last"]
    images = f"{found['prompts']} prompts x {found['per_prompt']} images, epochs {', '.join(map(str, found['epochs']))}"
    parts = table(["gold against the base", "runs", *KINDS], fates), table(["gold, last", "over seeds"], pairs), table(head, rows)
    return f"{images}; in sd of the base model, against it.\n\n" + "\n".join(parts)


def tables() -> dict[str, str]:
    """Title -> Markdown."""
    pilot, main, variants = (analysis.load(runner.RESULTS / name) for name in ("pilot", "main", "variants"))
    everything = [*main, *variants]
    found = {
        "Pilot: trained reward over the last fifth (largest approx_kl), by learning rate": pilot_table(pilot),
        "Outcome": outcome_table(main, list(arms.METHODS)),
        "Gold, paired differences": difference_table(main, PAIRS),
        "Proxy, paired differences": difference_table(main, PAIRS, PROXY),
        "The verdict against gold, counted": verdict_counts(main),
        "The verdict against gold, run by run": verdict_table(main),
    }
    if (runner.RESULTS / "held_out.json").exists():
        found["Held-out prompts: the cross-evaluation's verdict against gold"] = held_out_tables(
            json.loads((runner.RESULTS / "held_out.json").read_text())
        )
    if variants:
        there = [(name, method) for name, (method, _) in arms.VARIANTS.items() if analysis.of(variants, name)]
        found["Variants: outcome"] = outcome_table(everything, [name for name, _ in there])
        resets = [(name, "tdpo") for name, method in there if method == "tdpo-r" and name.startswith("reset-")]
        stronger = [(f"tdpo-r-{name}", f"tdpo-{name}") for name in ("relu", "4-critic-steps")]
        found["Variants: paired differences"] = variant_table(everything, [*there, *resets, *stronger])
        found["Variants: gold, paired differences to their method"] = (
            difference_table(everything, there) + "\n" + outside(everything, [*there, *resets])
        )
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    found = tables()
    text = "".join(f"## {title}\n\n{body}\n" for title, body in found.items())
    (OUT / "tables.md").write_text(
        "# Tables of the over-optimisation study\n\nWritten by `python benchmarks/overoptimisation/draw.py`; do not edit. "
        "Intervals: 95 %, Student's t over seeds. Differences are paired by seed. Values are means of "
        f"{verdict.WINDOW} epochs.\n\n{text}"
    )
    figures(analysis.load(runner.RESULTS / "main"), analysis.load(runner.RESULTS / "variants"))
    print(f"{OUT}: {', '.join(sorted(path.name for path in OUT.iterdir()))}")


if __name__ == "__main__":
    main()
