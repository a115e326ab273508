"""How healthy a training was: charts of the policy's update, of the critic, of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tdpo_cli.config.settings import Preset
from tdpo_cli.report.charts import OTHERS, PLAIN, Chart, Rows, Series, column, line_chart
from tdpo_cli.report.numbers import finite, known, share, short

PERCENT = {"zero": True, "percent": True, "show": lambda value: share(value, 1)}
SECONDS = {"zero": True, "show": lambda value: "–" if value is None else f"{short(value)} s"}


def policy(rows: Rows, preset: Preset) -> list[Markup]:
    norm, drift = preset.update.max_grad_norm, preset.drift_limit
    return [
        _chart(rows, "Agreement of the rewards", "Correlation, among samples of a prompt, of the trained reward with the watched learned ones. "
               "It falls where one of them is exploited.", {"agreement": "correlation"}, baseline=0.0),
        _chart(rows, "approx_kl", "How far an epoch's updates move the policy from the one that sampled.", {"approx_kl": "policy"}, zero=True),
        _chart(rows, "mean_kl", "Distance from the untrained model, along the sampled steps.", {"mean_kl": "reference"}, zero=True),
        _chart(rows, "Clip fractions", "Share of the trained steps whose ratio, or value, was clipped.",
               {"policy_clip_fraction": "policy", "critic_clip_fraction": "critic"}, **PERCENT),
        *(_chart(rows, f"Gradient norm of the {part}", "Before clipping, mean of the epoch's optimizer steps.", {f"{part}_grad_norm": part},
                 zero=True, limit=(norm, f"clipped to {norm:g}")) for part in ("policy", "critic")),
        _chart(rows, "ratio_drift", "Largest |log ratio| at an epoch's first optimizer step: rounding alone, 0 at best.", {"ratio_drift": "largest"},
               zero=True, limit=(drift, "at most rounding")),
        *_per_step(rows),
        *_constraints(rows, preset),
    ]  # fmt: skip


def critic(rows: Rows, resets: Sequence[int], preset: Preset) -> list[Markup]:
    """`resets`: the epochs at which neurons were re-initialised."""
    if not preset.has_critic:
        return []
    marked: dict[str, Any] = {"markers": resets, "marker_name": "neurons reset"}
    threshold = f"{preset.algorithm.dormant_threshold:g}"
    return [
        _chart(rows, "Explained variance", "1: the critic predicts the returns; 0: no better than their mean; below 0: worse.",
               {"critic_explained_variance": "critic"}, baseline=0.0, **marked),
        _chart(rows, "Dormant neurons", f"Share of the critic's neurons whose normalised activation is at most {threshold}.",
               {"dormant_fraction": "dormant", "dormant_fraction_extra": "at the second threshold"}, **PERCENT, **marked),
        _chart(rows, "Still dormant", "Of the neurons that were dormant before, the share that is again.", {"dormant_overlap": "overlap"},
               **PERCENT, **marked),
        _chart(rows, "Critic loss", "Mean of the epoch's optimizer steps.", {"critic_loss": "critic"}, zero=True, **marked),
    ]  # fmt: skip


def resources(rows: Rows) -> list[Markup]:
    if not rows:
        return []
    peak = max(known(column(rows, "peak_memory_bytes")), default=0)
    unit, factor = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    memory = [None if value is None else value / factor for value in column(rows, "peak_memory_bytes")]
    phases = {"seconds/rollout": "rollout", "seconds/score": "score", "seconds/update": "update"}
    return [
        _chart(rows, "Seconds per epoch", "By phase.", phases, **SECONDS),
        _chart(rows, "Images per second", "Over the whole epoch.", {"images_per_second": "images/s"}, zero=True),
        line_chart(Chart(f"Peak memory, {unit}", column(rows, "epoch"), [Series("so far", memory)], "Of the process that needs most.", zero=True)),
    ]


def _chart(rows: Rows, title: str, note: str, columns: dict[str, str], **more: Any) -> Markup:
    """A chart over epochs of the columns: key in metrics.jsonl -> name."""
    series = [Series(name, column(rows, key), look=look) for (key, name), look in zip(columns.items(), PLAIN, strict=False)]
    return line_chart(Chart(title, column(rows, "epoch"), series, note, **more))


def _per_step(rows: Rows) -> list[Markup]:
    """Each trained denoising step, in the first and in the last epoch; nothing for runs that did not record it."""
    recorded = [row for row in rows if isinstance(row.get("steps/clip_fraction"), list)]
    epochs = recorded[:1] + recorded[1:][-1:]
    if not epochs:
        return []

    def drawn(title: str, note: str, key: str, **more: Any) -> Markup:
        # a window of another length, as of cps, never changes within a run: every row has the same columns
        x = list(range(len(epochs[0][key])))
        series = [Series(f"epoch {row['epoch']}", row[key], look=look) for row, look in zip(epochs[::-1], PLAIN, strict=False)]
        return line_chart(Chart(title, x, series, note, x_label="trained step", dots=True, **more))

    return [
        drawn("Clipped, by denoising step", "Share of the samples whose ratio was clipped; 0 is the noisiest trained step.", "steps/clip_fraction",
              **PERCENT),
        drawn("Spread of the ratio, by denoising step", "Standard deviation over the epoch's samples: a step far above the others is the one that "
              "the clip range acts on.", "steps/ratio_std", zero=True),
    ]  # fmt: skip


def _constraints(rows: Rows, preset: Preset) -> list[Markup]:
    """Multipliers, and what they are to hold."""
    bounds = preset.reward.at_least
    if not bounds or not rows:
        return []
    looks = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(bounds)}
    series = lambda what: [Series(name, column(rows, f"constraints/{name}/{what}"), look=looks[name]) for name in bounds]
    epochs, bound = column(rows, "epoch"), next(iter(bounds.values()))
    limit = (bound, f"at least {bound:g}") if len(set(bounds.values())) == 1 else None
    note = f"Change of the mean, smoothed, in sd of epoch 0: {preset.constraints_words}."
    return [
        line_chart(Chart("Constraints", epochs, series("change"), note, baseline=0.0, limit=limit)),
        line_chart(Chart("Multipliers", epochs, series("multiplier"), "Weight of a constrained reward beside the training reward's 1.", zero=True)),
    ]


def resets_in_words(preset: Preset, epochs: Sequence[int]) -> str:
    if not preset.algorithm.facts.resets:
        return ""
    target = {"all": "all neurons", "none": "no neurons"}.get(preset.algorithm.reset_target, f"the {preset.algorithm.reset_target} neurons")
    when = f": at {', '.join(map(str, epochs[:20]))}{', …' if len(epochs) > 20 else ''}" if epochs else "; none yet"
    return f"TDPO-R re-initialises {target} of the critic every {preset.algorithm.reset_every} epochs{when}."


def skipped_steps(rows: Rows) -> list[str]:
    """A sentence per reason why optimizer steps were skipped."""
    said = []
    for key, what in (("skipped_steps", "skipped for a non-finite loss or gradient"), ("overflowed_steps", "skipped while the loss scale adapted")):
        epochs = [(row["epoch"], row[key]) for row in rows if finite(row.get(key))]
        if epochs:
            shown = ", ".join(f"{epoch}" for epoch, _ in epochs[:12]) + (", …" if len(epochs) > 12 else "")
            said.append(f"Optimizer steps {what}: {sum(count for _, count in epochs):g}, in epoch {shown}.")
    return said
