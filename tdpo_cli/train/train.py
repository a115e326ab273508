"""The training run: build what the preset names, run epoch after epoch, save, stop; start again smaller when memory runs out."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdpo_cli import __version__
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console, size
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.machine import measure, memory, signals
from tdpo_cli.machine.world import World, current, may_download
from tdpo_cli.models import settings
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import report
from tdpo_cli.storage.run_dir import RunDir, epoch_name
from tdpo_cli.train import epoch_table, fitting, messages, saving, trackers
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.state import Job, build


def run(preset: Preset, out: Path, resume: bool, console: Console, device: str | None = None) -> dict[str, Any]:
    """Train into the run folder `out`. -> a summary for --json, on the main process. Raises RequestError, WorkError."""
    started = time.perf_counter()
    world = current(device)
    if world.size > preset.rollout.samples_per_epoch:
        raise RequestError(f"{world.size} workers for rollout.samples_per_epoch {preset.rollout.samples_per_epoch}: each needs at least one sample.")
    folder = RunDir(out)
    resume = world.from_main(resume)  # where nothing is finished yet, another process may have looked after the main one began
    if world.is_main and resume:
        folder.lock()
        console.log = out / "log.txt"
    elif world.is_main:
        folder.must_be_free()
    if world.is_main:
        trackers.check(preset.run.trackers)
    if not resume or preset.rollout.eta is None and preset.rollout.dynamics is None:
        with world.first_on_each_machine() if may_download() else contextlib.nullcontext():
            preset = settings.fit(preset, settings.entry_of(preset))
    attempt = _Attempt(_plan(preset, world, folder, resume))
    while True:
        try:
            with trackers.started(preset, folder, console, world.is_main) as track:
                summary = _run(preset, world, folder, resume, attempt, console, started, track)
            world.close()
            return summary
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            samples = len(world.mine(preset.rollout.samples_per_epoch))
            smaller = attempt.plan.smaller(samples)
            if preset.run.micro_batch is not None or smaller is None or world.size > 1:
                reason = first_line(error, "out of memory")
                saved = " The last finished epoch is safe on disk." if folder.holds_a_run else ""
                raise WorkError(f"out of memory: {reason}\n{memory.advice(preset, min(attempt.plan.micro_batch, samples))}{saved}") from error
        attempt, recomputing = _Attempt(smaller, measures=False), " and gradient checkpointing" if smaller.checkpointing else ""
        console.warn(f"out of memory; going on from the last finished epoch with a micro-batch of {smaller.micro_batch}{recomputing}.")
        gc.collect()  # the networks of the attempt that failed; all are built anew
        torch.cuda.empty_cache()
        resume = folder.holds_a_run


@dataclass
class _Attempt:
    """How the work is cut up until memory runs out."""

    plan: memory.Plan
    measures: bool = True  # the micro-batch, before the first epoch; not again after memory ran out

    def measure(self, job: Job, console: Console) -> None:
        """Choose the micro-batch by a measured forward and backward pass on this GPU."""
        device = job.world.device
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        need = fitting.fit(job, memory.limit(job.preset, free, gpu=True), measure.Cuda(device))
        self.plan = job.plan
        if need is not None and job.world.is_main:
            console.say(f"measured: a forward and backward pass needs {size(need.fixed)}, and {size(need.each)} per sample of a micro-batch")


def _run(
    preset: Preset, world: World, folder: RunDir, resume: bool, attempt: _Attempt, console: Console, started: float, track: Callable[[], None]
) -> dict[str, Any]:
    out, warn = folder.path, console.warn if world.is_main else lambda text: None
    # read by the main process alone: the others may not see its disk
    loaded = world.from_main(folder.load_state(warn) if resume and world.is_main else None)
    first_epoch = loaded[0] + 1 if loaded else 0
    if world.is_main and resume:
        folder.take_back_metrics(first_epoch, warn)
    nothing_left = None
    if world.from_main(bool(loaded) and world.is_main and verdict.should_stop(folder.read_metrics(preset.rewards), preset)):
        nothing_left = f"stopped after epoch {first_epoch - 1} for over-optimising. To go on: --set run.stop_on_overoptimisation=none"
    elif first_epoch >= preset.run.epochs:
        nothing_left = f"all {preset.run.epochs} epochs are done."
    if nothing_left:
        console.say(f"{out}: {nothing_left}")
        track()
        return messages.summary(preset, folder, time.perf_counter() - started) if world.is_main else {}

    job = build(preset, world, attempt.plan, console.say, world.first_on_each_machine if may_download() else contextlib.nullcontext)
    preset = job.preset
    if loaded:
        job.load_state_dict(loaded[1])
    elif world.device.type == "cuda" and attempt.measures:
        attempt.measure(job, console)
    if world.is_main:
        if not resume:  # only now: a wrong request, found while building, leaves no folder behind
            folder.lock()
            folder.start(preset)
            console.log = out / "log.txt"
        else:
            folder.change_preset(preset)
        folder.add_environment(saving.environment(job, first_epoch))
        _warn_about_long_prompts(job, console)
        console.pairs(messages.header(job, out, first_epoch), title=f"tdpo {__version__}: training with {preset.algorithm.name.upper()}")
    if first_epoch == 0:
        saving.preview(job, folder, "before training", "before.png")
    if world.is_main:
        track()
        console.say("\n".join(["", *epoch_table.heading(preset)]))
    for epoch in range(first_epoch, preset.run.epochs):
        stop = _epoch(job, folder, epoch, console)
        track()
        world.barrier()
        if preset.run.stop_on_overoptimisation is not None and world.from_main(stop):
            break
    if not world.is_main:
        return {}
    report.write_or_warn(out, console.warn)
    summary = messages.summary(preset, folder, time.perf_counter() - started)
    messages.closing(summary, preset, console)
    return summary


def _epoch(job: Job, folder: RunDir, epoch: int, console: Console) -> bool:
    """Run an epoch; the main process saves and prints it. -> whether the run should stop, known on the main process"""
    row, stop = run_epoch(job, epoch, console), False
    with signals.held():  # an epoch that is computed is not lost to a signal
        saving.preview(job, folder, f"epoch {epoch}", f"{epoch_name(epoch)}.png")
        if job.world.is_main:
            rows = [*folder.read_metrics(), row]
            stop = verdict.should_stop(rows, job.preset)
            saving.save(job, folder, epoch, row, last=stop or epoch + 1 == job.preset.run.epochs)
    if job.world.is_main:
        _say_epoch(rows, job.preset, console)
    return stop


def _say_epoch(rows: Sequence[dict[str, Any]], preset: Preset, console: Console) -> None:
    """Print the newest epoch's line, and what changed with it."""
    console.say(epoch_table.line(rows[-1], rows[0], preset))
    if drifted := messages.drift_line(rows, preset):
        console.warn(drifted)
    if changed := messages.verdict_line(rows, preset):
        console.say(changed, style="bold")


def _plan(preset: Preset, world: World, folder: RunDir, resume: bool) -> memory.Plan:
    """How the work is cut up, the same on every process: as it was when the run stopped, unless another limit is asked for."""
    gpu = world.device.type == "cuda"
    recorded = world.from_main(folder.read_environments() if resume and world.is_main else [])
    if recorded and recorded[-1].get("memory_limit") == preset.run.memory_limit:
        before = recorded[-1]
        return memory.Plan(**before["plan"]) if "plan" in before else memory.Plan.of(before["micro_batch"])
    if gpu:
        free = torch.cuda.mem_get_info(world.device)[0]
    else:  # one number for all, which share it
        free = world.from_main(memory.main_memory()[1])
        free = None if free is None else free // world.size
    limit = memory.limit(preset, free, gpu, world.size)
    if limit is not None:
        limit = int(world.min(torch.tensor(limit)))
    return memory.choose(preset, limit, world.size, gpu)


def _warn_about_long_prompts(job: Job, console: Console) -> None:
    too_long = job.policy.longer_than_limit(job.prompts)
    if too_long:
        console.warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")
