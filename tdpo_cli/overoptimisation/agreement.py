"""How alike rewards rank the images of a prompt. Reward models that were trained apart agree on the base model's images.

Where a policy exploits one of them, they disagree: a rise of all means is then doubtful. Scores are [P,I], prompt by image, NaN where missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdpo_cli.overoptimisation.statistics import Estimate, by_prompt, interval
from tdpo_cli.overoptimisation.verdict import PARTED, TRUE_REWARDS, judges


def sums(trained: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray | None:
    """[P,I] each -> [P,3], what `correlation` adds up: products, squares of one, squares of the other. None without a whole image.

    The trained reward, and the mean of the others, each of them divided by its own standard deviation. An image counts by its distance
    from its prompt's mean, so which prompts are easy does not matter. An image that lacks a score is left out.
    """
    known = np.isfinite([trained, *others]).all(axis=0)  # [P,I]
    if not others or not known.any():
        return None
    mean = sum(scores / max(scores[known].std(), 1e-12) for scores in others)
    mine, theirs = (np.where(known, values - by_prompt(np.where(known, values, np.nan))[:, None], 0) for values in (trained, mean))
    return np.stack([(mine * theirs).sum(axis=1), (mine**2).sum(axis=1), (theirs**2).sum(axis=1)], axis=1)


def correlation(sums: np.ndarray) -> np.ndarray:
    """[...,3] -> [...]; NaN without spread."""
    spread = np.sqrt(sums[..., 1] * sums[..., 2])
    return np.where(spread > 1e-9, sums[..., 0] / np.maximum(spread, 1e-9), np.nan)


# --- in training --------------------------------------------------------------------------------------------------------
def of_samples(trained: Any, others: Sequence[Any], prompts: Sequence[str]) -> float | None:
    """Of an epoch's samples, in any order: scores [N], a prompt each. None where a score is missing, or where it has no meaning."""
    scores = np.asarray([np.asarray(column, dtype=np.float64) for column in (trained, *others)])
    if not np.isfinite(scores).all():
        return None
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    table = np.full((len(scores), len(groups), max(map(len, groups.values()))), np.nan)  # [1+K,P,I], padded where a prompt has fewer samples
    for row, indices in enumerate(groups.values()):
        table[:, row, : len(indices)] = scores[:, indices]
    found = sums(table[0], list(table[1:]))
    value = np.nan if found is None else float(correlation(found.sum(axis=0)))
    return None if np.isnan(value) else value


# --- of a model against its base ----------------------------------------------------------------------------------------
def of_model(scores: Mapping[str, np.ndarray], trained: str | None) -> np.ndarray | None:
    """`sums` of the trained reward and its judges; None where there are none, or one image a prompt."""
    names = judges(list(scores), trained)
    if trained not in scores or trained in TRUE_REWARDS or not names or scores[trained].shape[1] < 2:
        return None
    return sums(scores[trained], [scores[name] for name in names])


def change(base: np.ndarray, model: np.ndarray, draws: np.ndarray) -> dict[str, Estimate]:
    """`of_model` of both -> the agreement on the base's images, on the model's, and its change, paired, with intervals."""
    drawn = {name: correlation(np.einsum("rp,pk->rk", draws, added)) for name, added in (("base", base), ("model", model))}
    found = {name: correlation(added.sum(axis=0)) for name, added in (("base", base), ("model", model))}
    drawn["change"], found["change"] = drawn["model"] - drawn["base"], found["model"] - found["base"]
    prompts = int(((base[:, 1:] > 0) & (model[:, 1:] > 0)).all(axis=1).sum())  # whose images differ
    return {name: interval(float(found[name]), values, prompts) for name, values in drawn.items()}


def parted(agreement: Mapping[str, Estimate] | None) -> bool:
    """Whether trained and other rewards clearly agree less on the model's images than on the base's: by PARTED, as in training."""
    if agreement is None or agreement["change"]["low"] is None:
        return False
    base, model = agreement["base"], agreement["model"]
    return base["low"] > 0 and agreement["change"]["high"] < 0 and model["mean"] < PARTED * base["mean"]
