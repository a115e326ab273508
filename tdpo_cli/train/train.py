"""The training run: build what the preset names, then rollout, score, credit, update, reset, save, epoch after epoch."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli import __version__
from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.algorithms.base import usable
from tdpo_cli.config.preset import Preset
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.machine import memory, signals
from tdpo_cli.machine.world import World, current, may_download
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.report import report
from tdpo_cli.rewards import scoring
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train import metrics, trackers
from tdpo_cli.train.rollout import rollout
from tdpo_cli.train.state import Job, build
from tdpo_cli.train.update import Observer, Step, summarise, update
from tdpo_cli.types import Credit, Trajectory


def run(preset: Preset, out: Path, resume: bool, console: Console, device: str | None = None) -> dict[str, Any]:
    """Train into the run folder `out`. -> a summary for --json, on the main process. Raises RequestError, WorkError."""
    started = time.perf_counter()
    world = current(device)
    if world.size > preset.rollout.samples_per_epoch:
        raise RequestError(f"{world.size} workers for rollout.samples_per_epoch {preset.rollout.samples_per_epoch}: each needs at least one sample.")
    folder = RunDir(out)
    if world.is_main and resume:
        folder.lock()
        console.log = out / "log.txt"
    elif world.is_main:
        folder.must_be_free()
    if world.is_main:
        trackers.check(preset.run.trackers)
    plan = _plan(preset, world, folder, resume)
    while True:
        try:
            with trackers.started(preset, folder, console, world.is_main) as track:
                summary = _run(preset, world, folder, resume, plan, console, started, track)
            world.close()
            return summary
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            samples = len(world.mine(preset.rollout.samples_per_epoch))
            smaller = plan.smaller(samples)
            if preset.run.micro_batch is not None or smaller is None or world.size > 1:
                reason = first_line(error, "out of memory")
                saved = " The last finished epoch is safe on disk." if folder.holds_a_run else ""
                raise WorkError(f"out of memory: {reason}\n{memory.advice(preset, min(plan.micro_batch, samples))}{saved}") from error
        plan, recomputing = smaller, " and gradient checkpointing" if smaller.checkpointing else ""
        console.warn(f"out of memory; going on from the last finished epoch with a micro-batch of {plan.micro_batch}{recomputing}.")
        gc.collect()  # the networks of the attempt that failed; all are built anew
        torch.cuda.empty_cache()
        resume = folder.holds_a_run


def _run(
    preset: Preset, world: World, folder: RunDir, resume: bool, plan: memory.Plan, console: Console, started: float, track: Callable[[], None]
) -> dict[str, Any]:
    out, warn = folder.path, console.warn if world.is_main else lambda text: None
    # read by the main process alone: the others may not see its disk
    loaded = world.from_main(folder.load_state(warn) if resume and world.is_main else None)
    first_epoch = loaded[0] + 1 if loaded else 0
    if world.is_main and resume:
        folder.take_back_metrics(first_epoch, warn)
    nothing_left = None
    if world.from_main(bool(loaded) and world.is_main and verdict.should_stop(folder.read_metrics(), preset)):
        nothing_left = f"stopped after epoch {first_epoch - 1} for over-optimising. To go on: --set run.stop_on_overoptimisation=none"
    elif first_epoch >= preset.run.epochs:
        nothing_left = f"all {preset.run.epochs} epochs are done."
    if nothing_left:
        console.say(f"{out}: {nothing_left}")
        track()
        return metrics.summary(preset, folder, time.perf_counter() - started) if world.is_main else {}

    with world.first_on_each_machine() if may_download() else contextlib.nullcontext():
        job = build(preset, world, plan)
    if loaded:
        job.load_state_dict(loaded[1])
    if world.is_main:
        if not resume:  # only now: a wrong request, found while building, leaves no folder behind
            folder.lock()
            folder.start(preset)
            console.log = out / "log.txt"
        else:
            folder.write_preset(preset)
        folder.add_environment(metrics.environment(job, first_epoch))
        _warn_about_long_prompts(job, console)
        console.pairs(metrics.header(job, out, first_epoch), title=f"tdpo {__version__}: training with {preset.algorithm.name.upper()}")
        if first_epoch == 0:
            metrics.preview(job, folder, "before training", "before.png")
        track()
        console.say()
    for epoch in range(first_epoch, preset.run.epochs):
        row = _epoch(job, epoch, console)
        stop = False
        if world.is_main:
            rows = [*folder.read_metrics(), row]
            stop = verdict.should_stop(rows, preset)
            with signals.held():  # an epoch that is computed is not lost to a signal
                metrics.save(job, folder, epoch, row, last=stop or epoch + 1 == preset.run.epochs)
            track()
            console.say(metrics.epoch_line(row, rows[0], preset))
            if changed := metrics.verdict_line(rows, preset):
                console.say(changed, style="bold")
        world.barrier()
        if preset.run.stop_on_overoptimisation is not None and world.from_main(stop):
            break
    if not world.is_main:
        return {}
    report.write_or_warn(out, console.warn)
    summary = metrics.summary(preset, folder, time.perf_counter() - started)
    metrics.closing(summary, preset, console)
    return summary


def _epoch(job: Job, epoch: int, console: Console) -> dict[str, Any]:
    """One epoch, as the paper tells it. -> its row of metrics.jsonl"""
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
        credit = credit_of(job.algorithm, everyone, scores[preset.reward.train])
        steps, neurons = _inner_epochs(job, everyone, credit, _Watch(job, everyone, advance, console))
        job.algorithm.after_epoch(credit)
    seconds["total"] = time.perf_counter() - start

    job.updates += sum(not step.skipped for step in steps)
    return metrics.row(job, epoch, everyone, scores, credit, summarise(steps, world), neurons, seconds)


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
    fine = usable(everyone, scores[train])
    broken = [prompt for prompt, sound, score in zip(everyone.prompts, fine, scores[train], strict=True) if score.isfinite() and not sound]
    if broken:
        faults.append(f"epoch {everyone.epoch}: the networks gave non-finite log-probabilities or values for {_named(broken)}.")
    if not fine.any():
        raise WorkError(f"{' '.join(faults)} No sample is left to train on. The last finished epoch is safe on disk.")
    for fault in faults if job.world.is_main else ():
        console.warn(fault)


def _named(prompts: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(prompts))
    return ", ".join(map(repr, distinct[:3])) + (", ..." if len(distinct) > 3 else "")


def _plan(preset: Preset, world: World, folder: RunDir, resume: bool) -> memory.Plan:
    """How the work is cut up, the same on every process: as it was when the run stopped, unless another limit is asked for."""
    gpu = world.device.type == "cuda"
    recorded = world.from_main(folder.read_environments() if resume and world.is_main else [])
    if recorded and recorded[-1].get("memory_limit") == preset.run.memory_limit:
        before = recorded[-1]
        return memory.Plan(**before["plan"]) if "plan" in before else memory.Plan.of(before["micro_batch"])
    free = torch.cuda.mem_get_info(world.device)[0] if gpu else memory.main_memory()[1]
    limit = memory.limit(preset, free, gpu)
    if limit is not None:
        limit = int(world.min(torch.tensor(limit)))
    return memory.choose(preset, limit, world.size, gpu)


def _warn_about_long_prompts(job: Job, console: Console) -> None:
    too_long = job.policy.longer_than_limit(job.prompts)
    if too_long:
        console.warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")
