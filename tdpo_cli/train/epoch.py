"""One epoch: rollout, score, credit, update, statistics of the neurons."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tdpo_cli import algorithms
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine import memory
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.rewards import scoring
from tdpo_cli.train import metrics
from tdpo_cli.train.rollout import rollout
from tdpo_cli.train.state import Job
from tdpo_cli.train.update import Observer, Step, update
from tdpo_cli.types import Credit, Trajectory


def run_epoch(job: Job, epoch: int, console: Console) -> dict[str, Any]:
    """One epoch, in the paper's order. -> its row of metrics.jsonl"""
    preset, world, seconds = job.preset, job.world, {}
    ids, plan = world.mine(preset.rollout.samples_per_epoch), job.plan
    start = time.perf_counter()

    with console.timed(seconds, "rollout"), console.progress(f"epoch {epoch}: sampling", len(ids) * preset.rollout.steps) as advance:
        trajectory = rollout(
            job.policy, job.critic, job.encoder, job.randomness, job.prompts, epoch, ids,
            preset.rollout.guidance_scale, preset.needs_reference, plan.sample_batch, advance,
            decode_chunk=plan.decode_chunk, offload=plan.offload, looking=job.backbones.awake(job.encoder),
        )  # fmt: skip
    with console.timed(seconds, "score"), console.progress(f"epoch {epoch}: scoring", len(ids) * len(job.rewards)) as advance:
        everyone, scores = world.gather(trajectory, _scores(job, trajectory, advance))
        del trajectory  # and with it the images
        _report_faults(job, everyone, scores, console)

    with console.timed(seconds, "update"), console.progress(f"epoch {epoch}: updating", preset.updates_per_epoch) as advance:
        credit = algorithms.credit(job.algorithm, everyone, scores[preset.reward.train])
        steps, neurons = _inner_epochs(job, everyone, credit, _Watch(job, everyone, advance, console))
        job.algorithm.after_epoch(credit)
    seconds["total"] = time.perf_counter() - start

    job.updates += sum(not step.skipped for step in steps)
    return metrics.row(job, epoch, everyone, scores, credit, metrics.summarise(steps, world), neurons, seconds)


def _inner_epochs(job: Job, everyone: Trajectory, credit: Credit, watch: _Watch) -> tuple[list[Step], dict[str, Any]]:
    settings = job.preset.update
    steps, neurons = [], {}
    plan = unshuffled(len(everyone), job.preset.rollout.steps)
    for inner in range(settings.inner_epochs):
        watch.inner = inner
        plan = shuffle_plan(job.randomness, everyone.epoch, inner, plan, settings.shuffle_samples, settings.shuffle_timesteps)
        trained = plan.first_columns(job.preset.trained_steps)
        steps += update(
            job.policy, job.critic, job.optimizers, everyone, credit, trained, job.preset,
            job.randomness, inner, job.plan.micro_batch, job.world, watch,
        )  # fmt: skip
        critic_optimizer = job.optimizers.critic
        before = neurons.get("reset", 0)
        neurons = job.algorithm.after_inner_epoch(job.critic, critic_optimizer, everyone, trained, inner, job.randomness)
        if neurons:
            neurons["reset"] += before
    return steps, neurons


class _Watch(Observer):
    """Moves the progress bar; names the epoch's first optimizer step that had to be skipped; stops the run after too many."""

    def __init__(self, job: Job, everyone: Trajectory, advance: Callable[[int], None], console: Console):
        self.job, self.everyone, self.advance, self.console = job, everyone, advance, console
        self.inner, self.skipped = 0, 0

    def after_step(self, step: Step) -> None:
        self.advance(1)
        if not step.skipped:
            return
        job, where = self.job, f"epoch {self.everyone.epoch}, inner epoch {self.inner}, optimizer step {step.index}"
        self.skipped += 1
        job.bad_steps += 1
        if self.skipped == 1 and job.world.is_main:
            self.console.warn(f"{where}: non-finite {_fault(step, self.everyone)}. Such steps are skipped and counted (skipped_steps).")
        if job.bad_steps >= job.preset.run.max_bad_steps:
            raise WorkError(
                f"{where}: non-finite {_fault(step, self.everyone)}; with it, {job.bad_steps} optimizer steps with a non-finite loss or "
                "gradient (run.max_bad_steps). The last finished epoch is safe on disk; a lower update.learning_rate often helps."
            )


def _fault(step: Step, everyone: Trajectory) -> str:
    """What was not finite in an optimizer step, and for which prompts."""
    mine = step.sample_index[step.share]
    for name, losses, samples in (("policy loss", step.policy_losses, mine), ("critic loss", step.critic_losses, step.sample_index)):
        if losses is not None and not losses.isfinite().all():
            bad = samples[~losses.isfinite().cpu()].tolist()
            return f"{name}, for {_named(everyone.prompts[i] for i in bad)}"
    return "gradient of the critic" if step.policy_grad_norm.isfinite() else "gradient of the policy"


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
                f"epoch {trajectory.epoch}: reward {name} failed: {type(error).__name__}: {error}. The last finished epoch is safe on disk."
            ) from error
    return scores


def _report_faults(job: Job, everyone: Trajectory, scores: dict[str, Tensor], console: Console) -> None:
    """Name every reward that gave a non-finite score, and what follows. Raises WorkError if nothing is left to train on."""
    train, faults = job.preset.reward.train, []
    for name, values in scores.items():
        bad = [prompt for prompt, fine in zip(everyone.prompts, values.isfinite().tolist(), strict=True) if not fine]
        if bad:
            what = "optimizer steps with these samples are skipped" if name == train else "no mean of it in this epoch's row"
            faults.append(f"epoch {everyone.epoch}: reward {name} gave {len(bad)} non-finite scores, for {_named(bad)}; {what}.")
    usable = algorithms.usable(everyone, scores[train])
    broken = [prompt for prompt, fine, score in zip(everyone.prompts, usable, scores[train], strict=True) if score.isfinite() and not fine]
    if broken:
        faults.append(f"epoch {everyone.epoch}: the networks gave non-finite log-probabilities or values for {_named(broken)}.")
    if not usable.any():
        raise WorkError(f"{' '.join(faults)} No sample is left to train on. The last finished epoch is safe on disk.")
    for fault in faults if job.world.is_main else ():
        console.warn(fault)


def _named(prompts: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(prompts))
    return ", ".join(map(repr, distinct[:3])) + (", ..." if len(distinct) > 3 else "")
