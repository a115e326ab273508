"""Models compared over the same prompts and noise: differences, win rates, diversity, with intervals over prompts. Arrays only.

Values are [P,I], prompt by image; what is missing is NaN. An estimate is {"mean", "low", "high"}, None where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tdpo_cli.overoptimisation.verdict import TRUE_REWARDS, judges

RESAMPLES = 4000
LEVEL = 0.95

Estimate = dict[str, "float | None"]


# --- intervals ----------------------------------------------------------------------------------------------------------
def resample(prompts: int, seed: int, count: int = RESAMPLES) -> np.ndarray:
    """How often each of `count` resamples drew each prompt: [R,P]. One draw serves a whole comparison, so that numbers stay paired."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=count).astype(np.float64)


def estimate(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """Mean of [P] or [P,I] and its percentile bootstrap interval, prompts drawn with all their images (Efron & Tibshirani 1993, ch. 13).

    Images of one prompt are alike; drawn one by one they would pass for more evidence than they are. One prompt gives no interval.
    """
    values = values.reshape(len(values), -1)
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0).sum(axis=1), known.sum(axis=1).astype(np.float64)
    if not counts.any():
        return {"mean": None, "low": None, "high": None}
    mean = float(sums.sum() / counts.sum())
    # einsum, not @: BLAS adds in another order with another number of threads
    drawn = np.einsum("rp,p->r", draws, counts)
    means = np.einsum("rp,p->r", draws, sums)[drawn > 0] / drawn[drawn > 0]
    return interval(mean, means, int((counts > 0).sum()))


def interval(mean: float, drawn: np.ndarray, prompts: int) -> Estimate:
    """What was found, and the middle LEVEL of what the resamples gave."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(mean):
        return {"mean": None, "low": None, "high": None}
    if prompts < 2 or not drawn.size:
        return {"mean": mean, "low": None, "high": None}
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": mean, "low": float(low), "high": float(high)}


# --- of one model -------------------------------------------------------------------------------------------------------
def spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean and standard deviation (n in the denominator) of all images."""
    known = values[np.isfinite(values)]
    return {"mean": float(known.mean()), "std": float(known.std())} if known.size else {"mean": None, "std": None}


def wins(difference: np.ndarray) -> np.ndarray:
    """1 where the model is above the base, 1/2 where it is equal, 0 where it is below."""
    return np.where(np.isnan(difference), np.nan, (difference > 0) + 0.5 * (difference == 0))


def pairwise_distance(embeds: np.ndarray) -> np.ndarray:
    """[P,I,E] of unit length -> [P]: mean cosine distance over the pairs of a prompt's images, from |sum e|^2 = I + 2 sum_{i<j} e_i.e_j."""
    images = embeds.shape[1]
    if images < 2:
        return np.full(len(embeds), np.nan)
    similarity = ((embeds.astype(np.float64).sum(axis=1) ** 2).sum(axis=-1) - images) / (images * (images - 1))
    return np.maximum(1 - similarity, 0.0)


def by_prompt(values: np.ndarray) -> np.ndarray:
    """[...,P,I] -> [...,P]: mean of the known images, NaN where there is none."""
    known = np.isfinite(values)
    counts = known.sum(axis=-1)
    return np.where(counts > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(counts, 1), np.nan)


def share_all_rise(standardised: Mapping[str, np.ndarray]) -> float | None:
    """Share of prompts whose mean rises in every reward but the true ones."""
    names = judges(list(standardised), None)
    if not names:
        return None
    rises = np.stack([by_prompt(standardised[name]) for name in names])  # [K,P]
    known = np.isfinite(rises).all(axis=0)
    return float((rises[:, known] > 0).all(axis=0).mean()) if known.any() else None


def share_trained_rises_others_fall(standardised: Mapping[str, np.ndarray], trained: str | None) -> float | None:
    """Share of prompts where the trained reward rises and the mean of the other learned ones, on the common scale, falls."""
    others = mean_of_others(standardised, trained)
    if others is None:
        return None
    mine, others = by_prompt(standardised[trained]), by_prompt(others)
    known = np.isfinite(mine) & np.isfinite(others)
    return float(((mine > 0) & (others < 0))[known].mean()) if known.any() else None


def mean_of_others(standardised: Mapping[str, np.ndarray], trained: str | None) -> np.ndarray | None:
    """[P,I]: mean over the judges of one model's standardised differences; None where there is nobody to judge, or nothing to be judged."""
    names = judges(list(standardised), trained)
    if trained not in standardised or trained in TRUE_REWARDS or not names:
        return None
    return np.mean([standardised[name] for name in names], axis=0)  # NaN where one is missing


# --- of the checkpoints of a run ------------------------------------------------------------------------------------------
def peak_to_final(curve: np.ndarray, draws: np.ndarray) -> tuple[int, dict[str, Any]]:
    """[M,P,I], checkpoints in order -> index of the highest, and peak, final and their paired difference.

    The peak is the largest of M noisy numbers, so the drop leans upwards.
    """
    means = [estimate(values, draws)["mean"] for values in curve]
    peak = max(range(len(curve)), key=lambda m: -np.inf if means[m] is None else means[m])
    return peak, {"peak": means[peak], "final": means[-1], "drop": estimate(curve[peak] - curve[-1], draws)}


def since_best(trained: np.ndarray, others: np.ndarray, draws: np.ndarray) -> tuple[int, dict[str, Estimate]]:
    """[M,P,I] each, the base first -> index where `others` stand best, and how far both moved from there to the last.

    `others_held_out` is free of the luck of choosing: the best model is chosen on one half of the prompts and measured on the other half.
    """
    trained, others = by_prompt(trained), by_prompt(others)  # [M,P]
    best = _best(others)
    held_out = others[-1] - others[best]
    if others.shape[1] > 1:
        held_out = np.empty_like(others[-1])
        for half in (0, 1):
            held_out[half::2] = (others[-1] - others[_best(others[:, 1 - half :: 2])])[half::2]
    change = {"trained": trained[-1] - trained[best], "others": others[-1] - others[best], "others_held_out": held_out}
    return best, {name: estimate(values, draws) for name, values in change.items()}


def _best(curve: np.ndarray) -> int:
    """[M,P] -> the model with the highest mean, the earliest of equals."""
    known = np.isfinite(curve)
    means = np.where(known, curve, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return int(np.argmax(np.where(known.any(axis=1), means, -np.inf)))
