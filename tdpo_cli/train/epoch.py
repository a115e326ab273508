"""One epoch: draw and roll out, score, give credit, update, count neurons."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.algorithms.base import usable
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, WorkError, described
from tdpo_cli.machine import memory
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.rewards import scoring
from tdpo_cli.train import metrics, sharing
from tdpo_cli.train.metrics import EpochResult
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import Job, set_schedule
from tdpo_cli.train.update import Learner, Observer, Step
from tdpo_cli.types import Credit, ShufflePlan, Trajectory


def run_epoch(job: Job, epoch: int, console: Console) -> dict[str, Any]:
    """One epoch in the paper's order. -> its row of metrics.jsonl"""
    preset, world, seconds = job.preset, job.world, {}
    actor = Actor(job.policy, job.critic, job.encoder, job.randomness, preset, job.plan, job.backbones, job.view)
    start = time.perf_counter()
    if preset.rollout.window is not None:
        set_schedule(job.policy, preset, job.randomness, epoch)
    orders = _orders(job, epoch)
    home = sharing.homes(orders[0], preset.update.batch_size, world)
    ids = (home == world.rank).nonzero().flatten().tolist()

    with console.timed(seconds, "rollout"), console.progress(f"epoch {epoch}: sampling", len(ids) * preset.rollout.steps) as advance:
        draw = actor.draw(epoch, job.prompts)
        own = actor.rollout(draw, ids, advance)

    with console.timed(seconds, "score"), console.progress(f"epoch {epoch}: scoring", len(ids) * len(job.rewards)) as advance:
        samples, scores = sharing.of_all(own, draw, _scores(job, own, advance), home, world)
        del own  # and with it the images
        _report_faults(job, samples, scores, console)
        job.combination.begin(scores)

    with console.timed(seconds, "update"), console.progress(f"epoch {epoch}: updating", preset.updates_per_epoch) as advance:
        credit = credit_of(job.algorithm, samples, _in_training(job, scores), job.combination)
        steps, neurons = _inner_epochs(job, samples, credit, orders, _Watch(job, samples, advance, console))
        job.algorithm.after_epoch(credit)
        constraints = job.combination.after_epoch(scores)

    seconds["total"] = time.perf_counter() - start
    job.updates += sum(not step.outcome.skipped for step in steps)
    return metrics.row(job, EpochResult(epoch, samples, scores, credit, steps, neurons, constraints, seconds))


def _inner_epochs(
    job: Job, samples: Trajectory, credit: Credit, orders: Sequence[ShufflePlan], watch: _Watch
) -> tuple[list[Step], dict[str, Any]]:  # fmt: skip
    """Pass over the samples several times, each time in another order. -> optimizer steps, statistics of the critic's neurons"""
    learner = Learner(job.policy, job.critic, job.optimizers, job.preset, job.randomness, job.plan, job.world)
    steps, neurons = [], {}
    for inner, order in enumerate(orders):
        watch.inner = inner
        steps += learner.inner_epoch(samples, credit, order, inner, watch)
        before = neurons.get("reset", 0)
        neurons = job.algorithm.after_inner_epoch(job.critic, job.optimizers.critic, samples, order, inner, job.randomness)
        if neurons:
            neurons["reset"] += before
    return steps, neurons


def _orders(job: Job, epoch: int) -> list[ShufflePlan]:
    """The order of every inner epoch: a function of seed and epoch. Shuffles accumulate."""
    preset, settings, orders = job.preset, job.preset.update, []
    order = unshuffled(preset.rollout.samples_per_epoch, preset.stochastic_steps)
    for inner in range(settings.inner_epochs):
        order = shuffle_plan(job.randomness, epoch, inner, order, settings.shuffle_samples, settings.shuffle_timesteps)
        orders.append(order.first_columns(preset.trained_steps))
    return orders


class _Watch(Observer):
    """Moves the progress bar; names the epoch's first optimizer step that had to be skipped; stops the run after too many."""

    def __init__(self, job: Job, samples: Trajectory, advance: Callable[[int], None], console: Console):
        self.job, self.samples, self.advance, self.console = job, samples, advance, console
        self.inner, self.skipped = 0, 0

    def after_step(self, step: Step) -> None:
        self.advance(1)
        if not step.outcome.skipped:
            return
        job, where = self.job, f"epoch {self.samples.epoch}, inner epoch {self.inner}, optimizer step {step.batch.index}"
        fault = _fault(step, self.samples.prompts)
        self.skipped += 1
        job.bad_steps += 1
        if self.skipped == 1 and job.world.is_main:
            self.console.warn(f"{where}: non-finite {fault}. Such steps are skipped and counted (skipped_steps).")
        if job.bad_steps >= job.preset.run.max_bad_steps:
            raise WorkError(
                f"{where}: non-finite {fault}; with it, {job.bad_steps} optimizer steps with a non-finite loss or "
                "gradient (run.max_bad_steps). The last finished epoch is safe on disk; a lower update.learning_rate often helps."
            )


def _fault(step: Step, prompts: Sequence[str]) -> str:
    """What was not finite in an optimizer step, and for which prompts."""
    batch, own = step.batch, step.batch.sample_index[step.batch.own]
    parts = [("policy loss", step.policy.losses, own), ("KL term of the loss", step.policy.kl, own)]
    if step.critic is not None:
        parts.append(("critic loss", step.critic.losses, batch.sample_index))
    for name, losses, samples in parts:
        if not losses.isfinite().all():
            bad = samples[~losses.isfinite().cpu()].tolist()
            return f"{name}, for {_named(prompts[i] for i in bad)}"
    return "gradient of the critic" if step.outcome.policy_grad_norm.isfinite() else "gradient of the policy"


def _scores(job: Job, trajectory: Trajectory, advance: Callable[[int], None]) -> dict[str, Tensor]:
    scores = {}
    for name, reward in job.rewards.items():
        try:
            with job.backbones.awake(reward):
                scores |= scoring.score_images({name: reward}, trajectory.images, trajectory.prompts, job.plan.decode_chunk, advance)
        except Exception as error:
            if isinstance(error, RequestError) or memory.exhausted(error):
                raise
            raise WorkError(
                f"epoch {trajectory.epoch}: reward {name} failed: {described(error).rstrip('.')}. The last finished epoch is safe on disk."
            ) from error
    return scores


def _in_training(job: Job, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scores that training reads: of the rewards that train or constrain."""
    return {name: scores[name] for name in job.combination.names}


def _report_faults(job: Job, samples: Trajectory, scores: dict[str, Tensor], console: Console) -> None:
    """Name every reward that gave a non-finite score, and what follows. Raises WorkError if nothing is left to train on."""
    used, faults = _in_training(job, scores), []
    for name, values in scores.items():
        bad = [prompt for prompt, fine in zip(samples.prompts, values.isfinite().tolist(), strict=True) if not fine]
        if bad:
            what = "optimizer steps with these samples are skipped" if name in used else "no mean of it in this epoch's row"
            faults.append(f"epoch {samples.epoch}: reward {name} gave {len(bad)} non-finite scores, for {_named(bad)}; {what}.")
    fine = usable(samples, used)
    known = torch.stack(list(used.values())).isfinite().all(dim=0)
    broken = [prompt for prompt, sound, scored in zip(samples.prompts, fine, known, strict=True) if scored and not sound]
    if broken:
        faults.append(f"epoch {samples.epoch}: the networks gave non-finite log-probabilities or values for {_named(broken)}.")
    if not fine.any():
        raise WorkError(f"{' '.join(faults)} No sample is left to train on. The last finished epoch is safe on disk.")
    for fault in faults if job.world.is_main else ():
        console.warn(fault)


def _named(prompts: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(prompts))
    return ", ".join(map(repr, distinct[:3])) + (", ..." if len(distinct) > 3 else "")
