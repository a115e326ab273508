"""How healthy a training was: charts of the policy's update, of the critic, of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdpo_cli.config.preset import Preset
from tdpo_cli.report.charts import OTHERS, PLAIN, Chart, Rows, Series, chart, column, line_chart, stacked_chart
from tdpo_cli.report.html import escape
from tdpo_cli.report.numbers import finite, known, share, short


def policy(rows: Rows, preset: Preset) -> str:
    charts = [
        line_chart(chart(
            rows, "Agreement of the rewards",
            "Correlation, among samples of a prompt, of the trained reward with the watched learned ones. It falls where one of them is exploited.",
            [("agreement", "correlation")], baseline=0.0,
        )),
        line_chart(chart(
            rows, "approx_kl", "How far an epoch's updates move the policy from the one that sampled.", [("approx_kl", "policy")], zero=True,
        )),
        line_chart(chart(rows, "mean_kl", "Distance from the untrained model, along the sampled steps.", [("mean_kl", "reference")], zero=True)),
        line_chart(chart(
            rows, "Clip fractions", "Share of the trained steps whose ratio, or value, was clipped.",
            [("policy_clip_fraction", "policy"), ("critic_clip_fraction", "critic")], zero=True, percent=True, show=lambda v: share(v, 1),
        )),
        line_chart(chart(
            rows, "Gradient norms", "Before clipping, mean of the epoch's optimizer steps. Logarithmic.",
            [("policy_grad_norm", "policy"), ("critic_grad_norm", "critic")], log=True,
            limit=(preset.update.max_grad_norm, f"clipped to {preset.update.max_grad_norm:g}"),
        )),
        line_chart(chart(
            rows, "ratio_drift", "Largest |log ratio| at an epoch's first optimizer step: rounding alone, 0 at best.", [("ratio_drift", "largest")],
            zero=True, limit=(preset.drift_limit, "at most rounding"),
        )),
        *_per_step(rows),
        *_constraints(rows, preset),
    ]  # fmt: skip
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _per_step(rows: Rows) -> list[str]:
    """What became of each trained denoising step, in the first and in the last epoch; nothing for runs that did not record it."""
    recorded = [row for row in rows if isinstance(row.get("steps/clip_fraction"), list)]
    epochs = recorded[:1] + recorded[1:][-1:]
    if not epochs:
        return []

    def drawn(title: str, note: str, key: str, **more: Any) -> str:
        # a window of another length, as of cps, never changes within a run: every row has the same columns
        x = list(range(len(epochs[0][key])))
        series = [Series(f"epoch {row['epoch']}", row[key], look=look) for row, look in zip(epochs[::-1], PLAIN, strict=False)]
        return line_chart(Chart(title, x, series, note, x_label="trained step", dots=True, **more))

    return [
        drawn("Clipped, by denoising step", "Share of the samples whose ratio was clipped; 0 is the noisiest trained step.", "steps/clip_fraction",
              zero=True, percent=True, show=lambda v: share(v, 1)),
        drawn("Spread of the ratio, by denoising step", "Standard deviation over the epoch's samples: a step far above the others is the one that "
              "the clip range acts on.", "steps/ratio_std", zero=True),
    ]  # fmt: skip


def _constraints(rows: Rows, preset: Preset) -> list[str]:
    """Multipliers, and what they are to hold."""
    bounds = preset.reward.at_least
    if not bounds or not rows:
        return []
    looks = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(bounds)}
    series = lambda what: [Series(name, column(rows, f"constraints/{name}/{what}"), look=looks[name]) for name in bounds]
    epochs, bound = column(rows, "epoch"), next(iter(bounds.values()))
    limit = (bound, f"at least {bound:g}") if len(set(bounds.values())) == 1 else None
    return [
        line_chart(Chart("Constraints", epochs, series("change"), f"Change of the mean, smoothed, in sd of epoch 0: {preset.constraints_words}.",
                         baseline=0.0, limit=limit)),
        line_chart(Chart("Multipliers", epochs, series("multiplier"), "Weight of a constrained reward beside the training reward's 1.", zero=True)),
    ]  # fmt: skip


def critic(rows: Rows, all_rows: Rows, preset: Preset) -> str:
    if not preset.has_critic:
        return f"<p>{escape(preset.algorithm.name.upper())} has no critic.</p>" if rows else ""
    resets = [row["epoch"] for row in all_rows if finite(row.get("reset"))]
    marked = {"markers": resets, "marker_name": "neurons reset"}
    dormancy = [("dormant_fraction", "dormant"), ("dormant_fraction_extra", "at the second threshold")]
    charts = [
        line_chart(chart(
            rows, "Explained variance", "1: the critic predicts the returns; 0: no better than their mean; below 0: worse.",
            [("critic_explained_variance", "critic")], baseline=0.0, **marked,
        )),
        line_chart(chart(
            rows, "Dormant neurons",
            f"Share of the critic's neurons whose normalised activation is at most {preset.algorithm.dormant_threshold:g}.", dormancy, zero=True,
            percent=True, show=lambda v: share(v, 1), **marked,
        )),
        line_chart(chart(
            rows, "Still dormant", "Of the neurons that were dormant before, the share that is again.", [("dormant_overlap", "overlap")], zero=True,
            percent=True, show=lambda v: share(v, 1), **marked,
        )),
        line_chart(chart(rows, "Critic loss", "Mean of the epoch's optimizer steps.", [("critic_loss", "critic")], zero=True, **marked)),
    ]  # fmt: skip
    lead = f"<p class=lead>{escape(_resets(preset, resets))}</p>" if preset.algorithm.facts.resets and any(charts) else ""
    return f"{lead}<div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _resets(preset: Preset, epochs: Sequence[int]) -> str:
    target = {"all": "all neurons", "none": "no neurons"}.get(preset.algorithm.reset_target, f"the {preset.algorithm.reset_target} neurons")
    when = f": at {', '.join(map(str, epochs[:20]))}{', …' if len(epochs) > 20 else ''}" if epochs else "; none yet"
    return f"TDPO-R re-initialises {target} of the critic every {preset.algorithm.reset_every} epochs{when}."


def resources(rows: Rows) -> str:
    if not rows:
        return ""
    peak = max(known(column(rows, "peak_memory_bytes")), default=0)
    unit, factor = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    memory = [None if value is None else value / factor for value in column(rows, "peak_memory_bytes")]
    seconds = [("seconds/rollout", "rollout"), ("seconds/score", "score"), ("seconds/update", "update")]
    charts = [
        stacked_chart(
            chart(rows, "Seconds per epoch", "By phase, stacked.", seconds, zero=True, show=lambda v: "–" if v is None else f"{short(v)} s")
        ),
        line_chart(chart(rows, "Images per second", "Over the whole epoch.", [("images_per_second", "images/s")], zero=True)),
        line_chart(Chart(f"Peak memory, {unit}", column(rows, "epoch"), [Series("so far", memory)], "Of the process that needs most.", zero=True)),
    ]
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""
