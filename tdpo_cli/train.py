"""The training run: build what the preset names, then rollout, score, credit, update, reset, save, epoch after epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli import __version__, memory, record, scoring
from tdpo_cli.console import Console
from tdpo_cli.errors import WorkError
from tdpo_cli.job import Job, build
from tdpo_cli.preset import Preset
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.rollout import rollout
from tdpo_cli.run_dir import RunDir
from tdpo_cli.types import Credit, Trajectory
from tdpo_cli.update import Observer, Step, summarise, update
from tdpo_cli.world import World, current


def run(preset: Preset, out: Path, resume: bool, console: Console) -> dict[str, Any]:
    """Train into the run folder `out`. -> a summary for --json. Raises RequestError, WorkError."""
    started = time.perf_counter()
    world = current()
    folder = RunDir(out)
    if world.is_main and resume:
        folder.lock()
        console.log = out / "log.txt"
    elif world.is_main:
        folder.must_be_free()
    loaded = folder.load_state() if resume else None
    first_epoch = loaded[0] + 1 if loaded else 0
    if first_epoch >= preset.run.epochs:
        console.say(f"{out}: all {preset.run.epochs} epochs are done.")
        return record.summary(preset, folder, time.perf_counter() - started)

    job = build(preset, world, _micro_batch(preset, world, folder, resume))
    if loaded:
        job.load_state_dict(loaded[1])
    if world.is_main:
        if not resume:  # only now: a wrong request, found while building, leaves no folder behind
            folder.lock()
            folder.start(preset)
            console.log = out / "log.txt"
        else:
            folder.write_preset(preset)
        folder.add_environment(record.environment(job, first_epoch))
        folder.take_back_metrics(first_epoch)
        _warn_about_long_prompts(job, console)
        console.pairs(record.header(job, out, first_epoch), title=f"tdpo {__version__}: training with {preset.algorithm.name.upper()}")
        if first_epoch == 0:
            record.preview(job, folder, "before training", "before.png")
        console.say()
    for epoch in range(first_epoch, preset.run.epochs):
        row = _epoch(job, epoch, console)
        if world.is_main:
            record.save(job, folder, epoch, row)
            console.say(record.epoch_line(row, folder.read_metrics()[0], preset))
        world.barrier()
    report = record.summary(preset, folder, time.perf_counter() - started)
    if world.is_main:
        record.closing(report, preset, console)
    return report


def _epoch(job: Job, epoch: int, console: Console) -> dict[str, Any]:
    """One epoch, as the paper tells it. -> its row of metrics.jsonl"""
    preset, world, seconds = job.preset, job.world, {}
    ids = world.mine(preset.rollout.samples_per_epoch)
    start = time.perf_counter()

    with console.timed(seconds, "rollout"), console.progress(f"epoch {epoch}: sampling", len(ids) * preset.rollout.steps) as advance:
        trajectory = rollout(
            job.policy, job.critic, job.encoder, job.randomness, job.prompts, epoch, ids,
            preset.rollout.guidance_scale, preset.needs_reference, job.micro_batch, advance,
        )  # fmt: skip
    with console.timed(seconds, "score"), console.progress(f"epoch {epoch}: scoring", len(ids) * len(job.rewards)) as advance:
        scores = scoring.score_images(job.rewards, trajectory.images, trajectory.prompts, job.micro_batch, advance)
        everyone, scores = world.gather(trajectory, scores)
        _must_be_finite(scores, everyone)

    with console.timed(seconds, "update"), console.progress(f"epoch {epoch}: updating", preset.updates_per_epoch) as advance:
        credit = job.algorithm.credit(everyone, scores[preset.reward.train])
        steps, neurons = _inner_epochs(job, everyone, credit, advance)
        job.algorithm.after_epoch(credit)
    seconds["total"] = time.perf_counter() - start

    job.updates += sum(not step.skipped for step in steps)
    job.bad_steps += sum(step.skipped for step in steps)
    if job.bad_steps >= preset.run.max_bad_steps:
        raise WorkError(
            f"epoch {epoch}: {job.bad_steps} optimizer steps with a non-finite loss or gradient (run.max_bad_steps). "
            "The last finished epoch is safe on disk; a lower update.learning_rate often helps."
        )
    return record.row(job, epoch, everyone, scores, credit, summarise(steps, world), neurons, seconds)


def _inner_epochs(job: Job, everyone: Trajectory, credit: Credit, advance: Callable[[int], None]) -> tuple[list[Step], dict[str, Any]]:
    settings = job.preset.update
    steps, neurons = [], {}
    plan = unshuffled(len(everyone), job.preset.rollout.steps)
    for inner in range(settings.inner_epochs):
        plan = shuffle_plan(job.randomness, everyone.epoch, inner, plan, settings.shuffle_samples, settings.shuffle_timesteps)
        trained = plan.first_columns(job.preset.trained_steps)
        steps += update(
            job.policy, job.critic, job.optimizers, everyone, credit, trained, job.preset,
            job.randomness, inner, job.micro_batch, job.world, _Progress(advance),
        )  # fmt: skip
        critic_optimizer = job.optimizers.critic
        before = neurons.get("reset", 0)
        neurons = job.algorithm.after_inner_epoch(job.critic, critic_optimizer, everyone, trained, inner, job.randomness)
        if neurons:
            neurons["reset"] += before
    return steps, neurons


class _Progress(Observer):
    """Moves the progress bar."""

    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance

    def after_step(self, step: Step) -> None:
        self.advance(1)


def _must_be_finite(scores: dict[str, Tensor], everyone: Trajectory) -> None:
    for name, values in scores.items():
        bad = [prompt for prompt, ok in zip(everyone.prompts, values.isfinite().tolist(), strict=True) if not ok]
        if bad:
            raise WorkError(
                f"epoch {everyone.epoch}: reward {name} gave {len(bad)} non-finite scores, for {', '.join(map(repr, bad[:3]))}"
                f"{', ...' if len(bad) > 3 else ''}. The last finished epoch is safe on disk."
            )


def _micro_batch(preset: Preset, world: World, folder: RunDir, resume: bool) -> int:
    recorded = folder.read_environments() if resume else []
    if recorded:
        return recorded[-1]["micro_batch"]
    free = torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else None
    return memory.micro_batch(preset, free, world.size)


def _warn_about_long_prompts(job: Job, console: Console) -> None:
    too_long = job.policy.longer_than_limit(job.prompts)
    if too_long:
        console.warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")
