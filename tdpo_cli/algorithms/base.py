"""What every algorithm offers, and credit for epochs in which some numbers are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Credit, ShufflePlan, Trajectory


class Algorithm:
    """Base of all algorithms: no critic to look after, nothing to remember.

    `everyone` holds all samples of the epoch, ordered by sample id; the mathematics is single-process.
    """

    def normalise(self, prompt_keys: Sequence[str], rewards: Tensor, name: str | None = None) -> Tensor:
        """One reward on the scale on which rewards are added. rewards [N], raw -> [N] float64. name: None is the training reward"""
        raise NotImplementedError

    def share_out(self, everyone: Trajectory, normed: Tensor) -> Credit:
        """How much each step of each sample was worth. normed [N], one reward or the combination of several"""
        raise NotImplementedError

    def credit(self, everyone: Trajectory, rewards: Tensor) -> Credit:
        """What the training reward alone is worth. rewards [N], raw"""
        return self.share_out(everyone, self.normalise(everyone.prompt_keys, rewards))

    def after_inner_epoch(
        self, critic: Critic | None, optimizer: torch.optim.Optimizer | None, everyone: Trajectory,
        plan: ShufflePlan, inner: int, randomness: Randomness,
    ) -> dict[str, Any]:  # fmt: skip
        """Look at the critic's neurons, and re-initialise some. -> statistics for the epoch's row; none without a critic"""
        return {}

    def after_epoch(self, credit: Credit) -> None:
        """Called once the epoch has trained."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


Combine = Callable[[Mapping[str, Tensor]], Tensor]  # normalised rewards [N] each -> [N]


def only(normed: Mapping[str, Tensor]) -> Tensor:
    """The combination of one reward."""
    (reward,) = normed.values()
    return reward


def credit(algorithm: Algorithm, everyone: Trajectory, rewards: Mapping[str, Tensor], combine: Combine = only) -> Credit:
    """Credit of the samples whose numbers are all finite; the others get NaN and touch no statistics. rewards: raw, [N] each

    NaN credit makes the loss of exactly those optimizer steps NaN that hold such a sample, and the update skips them.
    """
    fine = usable(everyone, rewards)
    if fine.all():
        return _credit(algorithm, everyone, rewards, combine)
    rows = fine.nonzero().flatten()
    part = lambda tensor: None if tensor is None else tensor[rows.to(tensor.device)]
    some = replace(
        everyone, prompts=tuple(everyone.prompts[i] for i in rows), prompt_keys=tuple(everyone.prompt_keys[i] for i in rows),
        log_probs=part(everyone.log_probs), ref_log_probs=part(everyone.ref_log_probs), values=part(everyone.values),
    )  # fmt: skip
    known = _credit(algorithm, some, {name: scores[rows] for name, scores in rewards.items()}, combine)

    def spread(values: Tensor) -> Tensor:
        whole = torch.full((len(fine), *values.shape[1:]), float("nan"), dtype=values.dtype)
        whole[rows] = values
        return whole

    return Credit(spread(known.advantages), spread(known.returns), spread(known.normed_rewards), known.mean_kl)


def _credit(algorithm: Algorithm, everyone: Trajectory, rewards: Mapping[str, Tensor], combine: Combine) -> Credit:
    normed = {name: algorithm.normalise(everyone.prompt_keys, scores.cpu(), name) for name, scores in rewards.items()}
    return algorithm.share_out(everyone, combine(normed))


def usable(everyone: Trajectory, rewards: Mapping[str, Tensor]) -> Tensor:
    """Which samples have finite rewards, log-probabilities and values. -> [N] bool"""
    fine = torch.stack([scores.cpu().isfinite() for scores in rewards.values()]).all(dim=0)
    for steps in (everyone.log_probs, everyone.ref_log_probs, everyone.values):
        if steps is not None:
            fine = fine & steps.isfinite().all(dim=1).cpu()
    return fine
