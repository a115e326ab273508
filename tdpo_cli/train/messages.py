"""What a run prints: the header, a line per epoch, the closing words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.algorithms import ALGORITHMS
from tdpo_cli.config import prompts
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console, duration, significant, size
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import memory
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.storage.run_dir import RunDir, epochs_in
from tdpo_cli.train.state import Job


def header(job: Job, out: Path, first_epoch: int) -> Sequence[tuple[str, str]]:
    """What will happen, before it does."""
    preset, world = job.preset, job.world
    trained = sum(p.numel() for p in job.policy.trainable.values())
    how = f"LoRA rank {preset.model.lora_rank}" if preset.model.lora_rank else "whole network"
    epochs = f"{preset.run.epochs}" if first_epoch == 0 else f"{preset.run.epochs}, continuing at epoch {first_epoch}"
    reset = f"{preset.algorithm.reset_target} neurons every {preset.algorithm.reset_every} epochs"
    rows = [
        ("model", f"{preset.model.base}, {how}, {trained:,} trained weights"),
        ("reward", f"{preset.trained_words}" + (f", watching {', '.join(preset.reward.watch)}" if preset.reward.watch else "")),
        ("prompts", f"{preset.rollout.prompts} ({len(job.prompts)})"),
        ("samples per epoch", f"{preset.rollout.samples_per_epoch}, {preset.rollout.steps} denoising steps each"),
        ("optimizer steps", f"{preset.updates_per_epoch} per epoch, {preset.update.batch_size} samples each"),
        ("epochs", f"{epochs}; {preset.reward_queries:,} reward queries in all"),
        ("device", f"{world.device}, {world.size} process{'es' if world.size > 1 else ''}"),
        ("plan", f"{job.plan}"),
        ("memory", f"about {size(memory.estimate(preset, world.size, job.plan, world.device.type == 'cuda'))}"),
        ("run folder", f"{out}"),
    ]
    kinds = {"embedded": "an input of the network", "none": "not used: this model has none"}
    if (kind := job.policy.family.guidance) in kinds:
        rows.insert(4, ("guidance", f"{preset.rollout.guidance_scale:g}, {kinds[kind]}"))
    if job.policy.embeddings is not None:
        rows.insert(3, ("embeddings", job.policy.embeddings.words))
    if preset.reward.at_least:
        rows.insert(2, ("constraints", preset.constraints_words))
    if preset.algorithm.facts.resets:
        rows.insert(5, ("resets", reset))
    if preset.has_critic:
        views = {"decode": "by the VAE", "tiny": f"by {preset.model.tiny_vae}", "rgb": "by a linear map to colours"}
        rows.insert(5, ("critic", f"sees {preset.algorithm.critic_state}, decoded {views[preset.algorithm.critic_view]}"))
    return rows


def drift_line(rows: Sequence[dict[str, Any]], preset: Preset) -> str | None:
    """A warning after the run's first epoch whose ratios were not 1 before the first optimizer step; None after all others."""
    limit = preset.drift_limit
    *before, now = (row.get("ratio_drift") or 0.0 for row in rows)
    if now <= limit or any(drift > limit for drift in before):
        return None
    return (
        f"epoch {rows[-1]['epoch']}: before the first optimizer step the ratio of new and old probability should be 1, and its logarithm is "
        f"up to {significant(now, 2)} (ratio_drift; at most {significant(limit, 2)} is rounding). Usual causes: update.guidance is false while the "
        "rollout is guided; the network computes in half precision (model.dtype) and in batches of another size; run.compile; dropout in the network."
    )


def verdict_line(rows: Sequence[dict[str, Any]], preset: Preset) -> str | None:
    """The verdict's sentence after the epoch that changed it; None while it stays what it was, or before there is one."""
    now, before = verdict.read(rows, preset), verdict.read(rows[:-1], preset)
    said = now.kind != before.kind and now.kind not in ("too early", "unwatched", "unclear")
    return f"verdict: {now.sentence}" if said else None


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def summary(preset: Preset, folder: RunDir, seconds: float) -> dict[str, Any]:
    """What came out, for --json and for the closing lines."""
    rows = folder.read_metrics(preset.rewards)
    if not rows:
        raise RequestError(f"{folder.path}: no finished epoch there.")
    rewards = {
        name: {"first": rows[0][f"rewards/{name}/mean"], "last": rows[-1][f"rewards/{name}/mean"], "rise": verdict.rise(rows, name)}
        for name in dict.fromkeys((preset.trained, *preset.rewards))
    }
    finding = verdict.read(rows, preset)
    best = verdict.best(rows, preset, folder.saved_epochs())
    return {
        "run": str(folder.path), "epochs": len(rows), "rewards": rewards, "trained": preset.trained_words,
        "verdict": {"kind": finding.kind, "sentence": finding.sentence, "since": finding.since},
        "stopped": len(rows) < preset.run.epochs and verdict.should_stop(rows, preset),
        "checkpoint": str(epochs_in(folder.path / "checkpoints")[-1]), "best_checkpoint": None if best is None else str(folder.checkpoint(best)),
        "seconds": seconds, "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
    }  # fmt: skip


def closing(report: dict[str, Any], preset: Preset, console: Console) -> None:
    run = report["run"]
    console.say()
    how = f"stopped after {report['epochs']} of {preset.run.epochs}" if report["stopped"] else f"done: {report['epochs']}"
    console.say(f"{how} epochs in {duration(report['seconds'])}", style="bold")
    console.say("first and last epoch; rise: last fifth of the epochs minus first fifth")
    for name, reward in report["rewards"].items():
        role = "trained" if name in (preset.trained, *preset.weights) else "constraint" if name in preset.reward.at_least else "watched"
        rise = "-" if reward["rise"] is None else f"{reward['rise']:+.2f} sd"
        console.say(f"  {name:<14} {role}  {_shown(reward['first'])} -> {_shown(reward['last'])}  rise {rise}")
    console.say()
    console.say(f"verdict: {report['verdict']['sentence']}", style="bold")
    console.say()
    places = [
        ("checkpoint", report["checkpoint"]),
        ("report", f"{run}/report.html"),
        ("previews", f"{run}/images"),
        ("numbers", f"{run}/metrics.jsonl"),
    ]
    if report["best_checkpoint"] not in (None, report["checkpoint"]):
        places.insert(1, ("best by the watched rewards", report["best_checkpoint"]))
    console.pairs(places, title="where things are")
    prompt, run = shlex.quote(prompts.load(preset.rollout.prompts)[0]), shlex.quote(run)
    console.say()
    console.say("what to try next", style="bold")
    preset_file = shlex.quote(f"{report['run']}/preset.json")
    others = [name for name in ALGORITHMS if name != preset.algorithm.name]
    steps = {
        "better, or over-optimised? base and checkpoints on held-out prompts:": f"tdpo cross-eval {run}",
        "more images:": f"tdpo sample {run} {prompt} --per-prompt 8",
        "more epochs:": f"tdpo train --resume --out {run} --epochs {preset.run.epochs * 2}",
        "another algorithm:": f"tdpo train --preset {preset_file} --algorithm {others[0]}",
    }
    for why, command in steps.items():
        console.say(f"  {why}")
        console.say(f"    {command}")
