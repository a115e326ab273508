"""How far two runs may differ that compute the same in another order: other micro-batches, processes, processors.

Every bound is made from the rounding of fp32, not from what one machine happened to show. In words:

- A network's prediction carries a relative error u. Its layers follow each other about 64 deep, and each rounds to eps.
- A log-prob is the mean over D latent elements of -(z^2)/2, z = (x - mean) / sigma. An error u of the prediction moves z by
  u c / sigma, with c the prediction's coefficient in the mean. So log p is off by u c / sigma / sqrt(D), four of them for
  the worst pair. Its own size does not matter: a difference of two log-probs keeps the error, however small it is.
- The weights' movement in an epoch is off by a fraction g. The advantages of a batch have both signs, so its gradient is
  small beside its terms; and Adam divides each element by its own size. Both magnify u: MOVEMENT.
- The next epoch samples with these weights: images, rewards, advantages and the gradient are off by about g. GROWTH is what
  an epoch makes of g.

`tests/unit/test_tolerances.py` checks MOVEMENT and GROWTH from both sides, on any machine alike: noise of size u in every
prediction stays within the bounds, and mistakes (an order, a left-out micro-batch, a factor 1.01) do not. The bounds hold
away from a clip range: there the gradient jumps, and the last bit decides a whole pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.config.settings import Preset
from tdpo_cli.models.samplers.ddim import DDIM
from tdpo_cli.models.samplers.flow import Flow, noise_levels

EPS = torch.finfo(torch.float32).eps
PREDICTION = 64 * EPS  # u
ROLLOUT = 16  # a prediction's error after the steps of a rollout, guided and decoded, in units of u
MOVEMENT = 128  # g of the first epoch, in units of u
GROWTH = 4  # g of an epoch over that of the epoch before
WORST = 4  # standard deviations
LATENT_ELEMENTS = 256  # of the sandbox
NEURONS = 1024 + 128 + 64 + 16
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
EXACT = {"epoch", "reward_queries", "updates", "skipped_steps", "overflowed_steps"}
NOT_COMPARED = ("seconds/", "images_per_second", "peak_memory_bytes")


@cache
def flow_log_prob_error(steps: int, level: float = 0.7, shift: float = 1.5) -> float:
    """The same of flow-sde on the flow sandbox's schedule: the velocity's coefficient in the mean is c (1 - sigma) - (1 - sigma') sigma."""
    schedule = Flow.of({"shift": shift}, noise_levels(steps, level, None))
    sigma, after, std, c = (
        column[schedule.stochastic].double() for column in (schedule.sigma, schedule.sigma_next, schedule.std, schedule.coefficient)
    )
    return WORST * PREDICTION * ((c * (1 - sigma) - (1 - after) * sigma) / std).abs().max().item() / math.sqrt(LATENT_ELEMENTS)


def log_prob_error_of(preset: Preset) -> float:
    rollout = preset.rollout
    return flow_log_prob_error(rollout.steps) if preset.model.base == "sandbox-flow" else log_prob_error(rollout.steps, rollout.eta or 1.0)


@cache
def log_prob_error(steps: int, eta: float = 1.0) -> float:
    """Four standard deviations of a log-prob's rounding error, at the sharpest of the steps."""
    schedule = DDIM.of(SCHEDULER, steps, eta)
    abar, before, sigma = (column.double() for column in (schedule.abar, schedule.abar_prev, schedule.std))
    coefficient = (1 - before - sigma**2).clamp(min=0) ** 0.5 - (before * (1 - abar) / abar) ** 0.5
    return WORST * PREDICTION * (coefficient / sigma).abs().max().item() / math.sqrt(LATENT_ELEMENTS)


def bound(column: str, row: Mapping[str, Any], preset: Preset) -> float:
    """How far another computation's `column` may be from the one in this row of metrics."""
    value, epoch = row[column], row["epoch"]
    size = 0.0 if value is None or isinstance(value, list) else abs(value)  # lists have a number per step, and bounds of their own
    if column in EXACT:
        return 0.0
    size = 0.0 if isinstance(value, list) else abs(value or 0)
    moved = MOVEMENT * PREDICTION * GROWTH**epoch  # this epoch's g
    before = ROLLOUT * PREDICTION + (moved / GROWTH if epoch else 0.0)  # of images and rewards: made with the weights before
    pairs = preset.rollout.samples_per_epoch * preset.trained_steps
    rms_log_ratio = math.sqrt(2 * row["approx_kl"])
    log_ratio = 2 * log_prob_error_of(preset) + moved * rms_log_ratio  # old and new log-prob, and the movement
    # of one step alone: its ratios may spread more than the others'
    spreads = [spread for spread in row.get("steps/ratio_std", ()) if spread is not None]
    worst_step = 2 * log_prob_error_of(preset) + moved * max(spreads, default=0.0)
    if column.startswith("rewards/"):
        name = column.rsplit("/", 1)[0]
        return before * row[f"{name}/std"] + PREDICTION * abs(row[f"{name}/mean"])
    if column.startswith("constraints/"):  # in standard deviations of epoch 0; a multiplier adds up a tenth of it per epoch
        name = f"rewards/{column.split('/')[1]}"
        return WORST * (before + PREDICTION * abs(row[f"{name}/mean"]) / row[f"{name}/std"])
    bounds = {
        # a mean of advantages (of size 1, of both signs) times ratios
        "policy_loss": WORST * log_ratio / math.sqrt(pairs),
        # the mean of x^2 / 2: off by |x| times the error of x
        "approx_kl": rms_log_ratio * log_ratio + log_ratio**2 / 2,
        "critic_loss": before * math.sqrt(2 * (row["critic_loss"] or 0)),
        # the first step's weights are the rollout's: nothing but rounding
        "ratio_drift": 2 * log_prob_error_of(preset),
        # one pair at the edge, and those within the error of it
        "policy_clip_fraction": 1 / pairs + log_ratio / max(rms_log_ratio, log_ratio),
        "critic_clip_fraction": 1 / pairs + WORST * before,
        "policy_grad_norm": moved * size,
        "critic_grad_norm": moved * size,
        "critic_explained_variance": WORST * before,
        "agreement": WORST * before,
        # of squares of the predictions' movement
        "kl_loss": 2 * (moved * size + PREDICTION * math.sqrt(size)),
        "ema": moved * size,
        "steps/ratio_mean": worst_step,
        "steps/ratio_std": worst_step,
        "steps/clip_fraction": preset.trained_steps * (1 / pairs + worst_step / max(rms_log_ratio, worst_step)),
        "mean_kl": preset.rollout.steps * log_ratio,
        "dormant_fraction": 1 / NEURONS + moved,
        "dormant_fraction_extra": 1 / NEURONS + moved,
        "dormant_overlap": WORST * moved,
        "reset": 1 + moved * NEURONS,
    }
    return bounds[column]


def errors(row: Mapping[str, Any], other: Mapping[str, Any], preset: Preset) -> dict[str, float]:
    """Of every column the difference in units of its bound; infinite if only one of the two has a number."""
    assert row.keys() == other.keys()
    found = {}
    for column, value in row.items():
        if column.startswith(NOT_COMPARED):
            continue
        if value is None or other[column] is None:
            found[column] = 0.0 if value is other[column] else math.inf
            continue
        allowed = bound(column, row, preset)
        if isinstance(value, list):
            assert [one is None for one in value] == [one is None for one in other[column]]
            difference = max(abs(one - two) for one, two in zip(value, other[column], strict=True) if one is not None)
        else:
            difference = abs(other[column] - value)
        found[column] = difference / allowed if allowed else (math.inf if difference else 0.0)
    return found


def same_output(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two computations of a network's output or gradient agree: an element near 0 is a sum of terms as large as the others'."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= PREDICTION * theirs.abs().max())


def assert_same_run(row: Mapping[str, Any], other: Mapping[str, Any], preset: Preset) -> None:
    """Both are the same epoch's metrics, computed in another order."""
    found = errors(row, other, preset)
    worst = max(found, key=found.get)
    print(f"epoch {row['epoch']}: the largest error is {found[worst]:.2g} of its bound, {worst}")
    wrong = {name: (row[name], other[name], f"{error:.3g} of the bound") for name, error in found.items() if not error <= 1}
    assert not wrong, f"epoch {row['epoch']}: {wrong}"
