"""Several rewards as one: those that train by their weights, those that are held above a bound by Lagrange multipliers.

Arithmetic on the scores of an epoch's samples, in float64: every process has all scores and computes the same. The idea of constraints
on monitored rewards is that of Constrained Diffusion Policy Optimization (Zhang et al. 2025), whose code is not public; the update rule
is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import WorkError

SMOOTHING = 0.7  # share of the change so far; the newest epoch has the rest
SLOWER = 0.1  # of the rate, while a constraint holds


def combined(normed: Mapping[str, Tensor], weights: Mapping[str, float], multipliers: Mapping[str, float]) -> Tensor:
    """(sum w_j r_j / sum w_j + sum lambda_i r_i) / (1 + sum lambda_i) of normalised rewards r. [N] each -> [N]

    The divisors keep the sum on the scale of one reward, so that learning rate and clip range keep their meaning.
    """
    trained = sum(weight * normed[name] for name, weight in weights.items()) / sum(weights.values())
    held = sum(multiplier * normed[name] for name, multiplier in multipliers.items())
    return (trained + held) / (1 + sum(multipliers.values()))


def next_multiplier(multiplier: float, short: float, rate: float, most: float) -> float:
    """Rise with what a reward is short of its bound; fall a tenth as fast while it is above (`short` < 0). Within [0, most]."""
    return min(max(multiplier + (rate if short > 0 else rate * SLOWER) * short, 0.0), most)


@dataclass
class Constraint:
    """A reward whose mean may change by no less than `bound`."""

    bound: float  # in standard deviations of epoch 0, from epoch 0's mean
    multiplier: float = 0.0  # of the epoch that comes
    change: float = 0.0  # of the mean since epoch 0, smoothed over epochs, on the bound's scale

    def after_epoch(self, change: float, rate: float, most: float) -> None:
        """Take in the change of an epoch's mean; move the multiplier."""
        self.change = SMOOTHING * self.change + (1 - SMOOTHING) * change
        self.multiplier = next_multiplier(self.multiplier, self.bound - self.change, rate, most)


class Combination:
    """What training makes of its rewards, from epoch to epoch. With one reward and no constraint it does nothing."""

    def __init__(self, preset: Preset):
        reward = preset.reward
        self.weights, self.rate, self.most = preset.weights, reward.constraint_rate, reward.constraint_max
        self.constraints = {name: Constraint(bound) for name, bound in reward.at_least.items()}
        self.several = len(self.weights) > 1
        self.names = (*self.weights, *self.constraints)  # what takes part in training
        self.start: dict[str, tuple[float, float]] = {}  # mean and standard deviation of epoch 0, of what is measured by them

    def __call__(self, normed: Mapping[str, Tensor]) -> Tensor:
        """The reward that training sees, of normalised rewards. [N] each -> [N]"""
        return combined(normed, self.weights, {name: one.multiplier for name, one in self.constraints.items()})

    def begin(self, scores: Mapping[str, Tensor]) -> None:
        """Take mean and spread of the run's first epoch. scores [N] each, raw. Raises WorkError where there is no spread."""
        measured = self.names if self.several else tuple(self.constraints)
        for name in measured if not self.start else ():
            known = _finite(scores[name])
            spread = known.std(correction=0).item() if len(known) else 0.0
            if spread == 0:
                raise WorkError(
                    f"reward {name} gave all images of the first epoch the same score, so changes of it have no unit. "
                    "Leave it out of reward.train_weights and reward.at_least."
                )
            self.start[name] = known.mean().item(), spread

    def trained(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The curve of training: raw scores of one reward, or of several the weighted mean of their changes in sd of epoch 0. [N]"""
        if not self.several:
            return next(scores[name] for name in self.weights)
        changes = {name: (scores[name].double() - self.start[name][0]) / self.start[name][1] for name in self.weights}
        return combined(changes, self.weights, {})

    def after_epoch(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the multipliers by an epoch's scores. -> columns of its row: the multipliers that it trained with"""
        columns = {}
        for name, one in self.constraints.items():
            columns[f"constraints/{name}/multiplier"] = one.multiplier
            known, (mean, spread) = _finite(scores[name]), self.start[name]
            if len(known):
                one.after_epoch((known.mean().item() - mean) / spread, self.rate, self.most)
            columns[f"constraints/{name}/change"] = one.change
        return columns

    def state_dict(self) -> dict[str, Any]:
        held = {name: {"multiplier": one.multiplier, "change": one.change} for name, one in self.constraints.items()}
        return {"start": {name: list(pair) for name, pair in self.start.items()}, "constraints": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = {name: (mean, spread) for name, (mean, spread) in state["start"].items()}
        for name, held in state["constraints"].items():
            self.constraints[name].multiplier, self.constraints[name].change = held["multiplier"], held["change"]


def _finite(scores: Tensor) -> Tensor:
    """[N] -> the known ones, float64"""
    return scores.double()[scores.isfinite()]
