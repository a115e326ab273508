"""The training run: build what the preset names, then rollout, score, credit, update, reset, save, epoch after epoch."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli import __version__, algorithms, grid, memory, models, prompts, scoring, verdict
from tdpo_cli.console import Console, duration, significant
from tdpo_cli.critic import Critic
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.models.lora import FILE as LORA_FILE
from tdpo_cli.preset import Preset
from tdpo_cli.randomness import Randomness, shuffle_plan, unshuffled
from tdpo_cli.rewards import Reward
from tdpo_cli.rewards.backbones import Backbones, ImageEncoder, critic_encoder
from tdpo_cli.rollout import generate, rollout
from tdpo_cli.run_dir import RunDir, epoch_name
from tdpo_cli.types import Credit, Trajectory
from tdpo_cli.update import Observer, Optimizers, Step, make_optimizers, summarise, update
from tdpo_cli.world import World, current

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "numpy", "pillow")


@dataclass
class Job:
    """Everything a run is made of. Built once; the loop below only reads its fields and moves its weights."""

    preset: Preset
    world: World
    policy: models.Policy
    rewards: dict[str, Reward]
    encoder: ImageEncoder | None
    critic: Critic | None
    optimizers: Optimizers
    algorithm: algorithms.Algorithm
    randomness: Randomness
    prompts: list[str]
    micro_batch: int
    updates: int = 0  # optimizer steps so far
    bad_steps: int = 0  # ... of which were skipped

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "policy_optimizer": self.optimizers.policy.state_dict(),
            "scaler": self.optimizers.scaler.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "critic_optimizer": self.optimizers.critic.state_dict() if self.critic else None,
            "algorithm": self.algorithm.state_dict(),
            "updates": self.updates,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizers.policy.load_state_dict(state["policy_optimizer"])
        self.optimizers.scaler.load_state_dict(state["scaler"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
            self.optimizers.critic.load_state_dict(state["critic_optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.updates, self.bad_steps = state["updates"], state["bad_steps"]


def build(preset: Preset, world: World, micro_batch: int) -> Job:
    """Load the networks and set up what trains. Raises RequestError for what the preset names and is not there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = preset.model.tf32
    randomness = Randomness(preset.run.seed)
    prompt_list = prompts.load(preset.rollout.prompts)
    policy = models.load(
        preset.model, device=world.device, negative_prompt=preset.rollout.negative_prompt,
        keep_reference=preset.needs_reference, randomness=randomness,
    )  # fmt: skip
    policy.set_schedule(preset.rollout.steps, preset.rollout.eta)
    backbones = Backbones(world.device)
    checkpoints = scoring.checkpoints(preset.reward.zoo, preset.reward.checkpoints)
    rewards = scoring.load_rewards(preset.rewards, backbones, checkpoints)
    encoder = critic = None
    if preset.has_critic:
        encoder = critic_encoder(preset.reward.train, backbones, checkpoints)
        critic = Critic(encoder.embed_dim, preset.algorithm.critic_init_std)
        critic.initialise(randomness.initial_weights("critic"))
        critic.to(world.device)
    optimizers = make_optimizers(policy, critic, preset)
    return Job(
        preset, world, policy, rewards, encoder, critic, optimizers, algorithms.make(preset), randomness, prompt_list, micro_batch
    )


def run(preset: Preset, out: Path, resume: bool, console: Console) -> dict[str, Any]:
    """Train into the run folder `out`. -> a summary for --json. Raises RequestError, WorkError."""
    started = time.perf_counter()
    world = current()
    folder = RunDir(out)
    if world.is_main:
        folder.lock()
        if not resume:
            folder.start(preset)
        else:
            folder.write_preset(preset)
        console.log = out / "log.txt"
    loaded = folder.load_state() if resume else None
    first_epoch = loaded[0] + 1 if loaded else 0
    if first_epoch >= preset.run.epochs:
        console.say(f"{out}: all {preset.run.epochs} epochs are done.")
        return summary(preset, folder, time.perf_counter() - started)

    job = build(preset, world, _micro_batch(preset, world, folder, resume))
    if loaded:
        job.load_state_dict(loaded[1])
    if world.is_main:
        folder.add_environment(environment(job, first_epoch))
        folder.take_back_metrics(first_epoch)
        _warn_about_long_prompts(job, console)
        console.pairs(header(job, out, first_epoch), title=f"tdpo {__version__}: training with {preset.algorithm.name.upper()}")
        if first_epoch == 0:
            _preview(job, folder, "before training", "before.png")
        console.say()
    for epoch in range(first_epoch, preset.run.epochs):
        row = _epoch(job, epoch, console)
        if world.is_main:
            _save(job, folder, epoch, row)
            console.say(epoch_line(row, folder.read_metrics()[0], preset))
        world.barrier()
    report = summary(preset, folder, time.perf_counter() - started)
    if world.is_main:
        closing(report, preset, console)
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
    return _row(job, epoch, everyone, scores, credit, summarise(steps, world), neurons, seconds)


def _inner_epochs(job: Job, everyone: Trajectory, credit: Credit, advance) -> tuple[list[Step], dict[str, Any]]:
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
    def __init__(self, advance):
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


# --- what is written down -------------------------------------------------------------------------------------------------
def _row(
    job: Job, epoch: int, everyone: Trajectory, scores: dict[str, Tensor], credit: Credit,
    means: dict[str, Any], neurons: dict[str, Any], seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"epoch": epoch, "reward_queries": (epoch + 1) * len(everyone)}
    for name, values in scores.items():
        row[f"rewards/{name}/mean"] = values.double().mean().item()
        row[f"rewards/{name}/std"] = values.double().std(correction=0).item()
    row |= means
    row["critic_explained_variance"] = None
    if everyone.values is not None:
        residual = (credit.returns - everyone.values.cpu()).var(correction=0)
        row["critic_explained_variance"] = (1 - residual / credit.returns.var(correction=0).clamp(min=1e-12)).item()
    row["updates"] = job.updates
    for name in ("dormant_fraction", "dormant_overlap", "dormant_fraction_extra", "reset"):
        row[name] = neurons.get(name)
    row["mean_kl"] = credit.mean_kl
    row |= {f"seconds/{name}": value for name, value in seconds.items()}
    row["images_per_second"] = len(everyone) / seconds["total"]
    row["peak_memory_bytes"] = peak_memory(job.world.device)
    return row


def _save(job: Job, folder: RunDir, epoch: int, row: dict[str, Any]) -> None:
    """The order matters: a state on disk means that its metrics row and its checkpoint are there too."""
    run, digest = job.preset.run, job.preset.digest()
    _preview(job, folder, f"epoch {epoch}", f"{epoch_name(epoch)}.png")
    folder.log(row)
    if (epoch + 1) % run.save_every == 0 or epoch + 1 == run.epochs:
        folder.save_checkpoint(epoch, lambda path: _write_checkpoint(job, path, epoch, row), digest, run.keep_last)
    folder.save_state(epoch, job.state_dict(), digest)


def _write_checkpoint(job: Job, path: Path, epoch: int, row: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    job.policy.save(path)
    if job.critic is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in job.critic.state_dict().items()}, path / "critic.safetensors")
    (path / "README.md").write_text(model_card(job.preset, epoch, row), encoding="utf-8")


def model_card(preset: Preset, epoch: int, row: dict[str, Any]) -> str:
    """The hub's model card of one checkpoint."""
    scores = "\n".join(f"| {name} | {row[f'rewards/{name}/mean']:.4f} | {row[f'rewards/{name}/std']:.4f} |" for name in preset.rewards)
    lora = preset.model.lora_rank > 0
    base = f"base_model: {preset.model.base}\n" if "/" in preset.model.base and not Path(preset.model.base).exists() else ""
    load = f'pipe.load_lora_weights("{epoch_name(epoch)}")' if lora else "unet = UNet2DConditionModel.from_pretrained(folder, subfolder='unet')"
    return f"""---
library_name: diffusers
tags: [text-to-image, diffusers{", lora" if lora else ""}, reinforcement-learning, {preset.algorithm.name}]
{base}---

# {preset.algorithm.name.upper()} on {preset.reward.train}, epoch {epoch}

Trained with tdpo {__version__} from `{preset.model.base}` on the reward `{preset.reward.train}`, {row["reward_queries"]} reward queries,
{row["updates"]} optimizer steps, seed {preset.run.seed}. A reward model's score that rises is not proof of better images:
compare the watched rewards.

| reward (on the epoch's own training samples) | mean | std |
|---|---|---|
{scores}

    {load}

Guidance scale {preset.rollout.guidance_scale:g}, {preset.rollout.steps} DDIM steps. The weights here: {LORA_FILE if lora else "unet/"}.
"""


def _preview(job: Job, folder: RunDir, title: str, file: str) -> None:
    """Fixed prompts and fixed noise, apart from training: what changes from epoch to epoch is the policy alone."""
    count = job.preset.run.preview_images
    if count == 0:
        return
    shown = [job.prompts[i % len(job.prompts)] for i in range(count)]
    batches = generate(
        job.policy, shown, range(count), Randomness(job.preset.run.seed, "preview"), job.preset.rollout.guidance_scale, job.micro_batch
    )
    images = [grid.to_pil(image) for batch in batches for image in batch]
    (folder.path / "images").mkdir(exist_ok=True)
    grid.draw(images, shown, columns=min(count, 4), title=title).save(folder.path / "images" / file)


def environment(job: Job, first_epoch: int) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = job.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "first_epoch": first_epoch,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tdpo": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "world_size": job.world.size,
        "micro_batch": job.micro_batch,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


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


# --- what is said -----------------------------------------------------------------------------------------------------------
def header(job: Job, out: Path, first_epoch: int) -> Sequence[tuple[str, str]]:
    """What will happen, before it does."""
    preset, world = job.preset, job.world
    trained = sum(p.numel() for p in job.policy.trainable.values())
    how = f"LoRA rank {preset.model.lora_rank}" if preset.model.lora_rank else "whole UNet"
    epochs = f"{preset.run.epochs}" if first_epoch == 0 else f"{preset.run.epochs}, continuing at epoch {first_epoch}"
    reset = f"{preset.algorithm.reset_target} neurons every {preset.algorithm.reset_every} epochs"
    rows = [
        ("model", f"{preset.model.base}, {how}, {trained:,} trained weights"),
        ("reward", f"{preset.reward.train}" + (f", watching {', '.join(preset.reward.watch)}" if preset.reward.watch else "")),
        ("prompts", f"{preset.rollout.prompts} ({len(job.prompts)})"),
        ("samples per epoch", f"{preset.rollout.samples_per_epoch}, {preset.rollout.steps} denoising steps each"),
        ("optimizer steps", f"{preset.updates_per_epoch} per epoch, {preset.update.batch_size} samples each"),
        ("epochs", f"{epochs}; {preset.reward_queries:,} reward queries in all"),
        ("device", f"{world.device}, {world.size} process{'es' if world.size > 1 else ''}, micro-batch {job.micro_batch}"),
        ("run folder", f"{out}"),
    ]
    if preset.algorithm.name == "tdpo-r":
        rows.insert(5, ("resets", reset))
    return rows


def epoch_line(row: dict[str, Any], first: dict[str, Any], preset: Preset) -> str:
    """One line: trained reward and its rise in units of epoch 0's spread, watched rewards, health of the update, time."""
    name = preset.reward.train
    spread = first[f"rewards/{name}/std"] or 1
    rise = (row[f"rewards/{name}/mean"] - first[f"rewards/{name}/mean"]) / spread
    parts = [
        f"epoch {row['epoch'] + 1:>{len(str(preset.run.epochs))}}/{preset.run.epochs}",
        f"{name} {row[f'rewards/{name}/mean']:.3f} ({rise:+.2f} sd)",
        *(f"{watched} {row[f'rewards/{watched}/mean']:.3f}" for watched in preset.reward.watch),
        f"kl {significant(row['approx_kl'], 2)}",
        f"clipped {100 * row['policy_clip_fraction']:.0f}%",
    ]
    if row["dormant_fraction"] is not None:
        parts.append(f"dormant {100 * row['dormant_fraction']:.0f}%")
    if row["reset"]:
        parts.append(f"reset {row['reset']}")
    return "  ".join([*parts, f"{row['seconds/total']:.1f} s"])


def summary(preset: Preset, folder: RunDir, seconds: float) -> dict[str, Any]:
    """What came out, for --json and for the closing lines."""
    rows = folder.read_metrics()
    if not rows:
        raise RequestError(f"{folder.path}: no finished epoch there.")
    rewards = {
        name: {"first": rows[0][f"rewards/{name}/mean"], "last": rows[-1][f"rewards/{name}/mean"], "rise": verdict.rise(rows, name)}
        for name in preset.rewards
    }
    return {
        "run": str(folder.path), "epochs": len(rows), "rewards": rewards, "trained": preset.reward.train,
        "checkpoint": str(folder.checkpoint()), "seconds": seconds, "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
    }  # fmt: skip


def closing(report: dict[str, Any], preset: Preset, console: Console) -> None:
    run = report["run"]
    console.say()
    console.say(f"done: {report['epochs']} epochs in {duration(report['seconds'])}", style="bold")
    for name, reward in report["rewards"].items():
        role = "trained" if name == report["trained"] else "watched"
        rise = "-" if reward["rise"] is None else f"{reward['rise']:+.2f} sd"
        console.say(f"  {name:<14} {role}  {reward['first']:.3f} -> {reward['last']:.3f}  ({rise}, last fifth against first fifth)")
    console.say()
    console.pairs(
        [("checkpoint", report["checkpoint"]), ("previews", f"{run}/images"), ("numbers", f"{run}/metrics.jsonl")], title="where things are"
    )
    prompt = job_prompt(preset)
    console.say()
    console.say("what to try next", style="bold")
    console.say(f'  tdpo sample {run} "{prompt}"')
    console.say(f"  tdpo train --resume --out {run} --epochs {preset.run.epochs * 2}")
    console.say(f"  tdpo train --preset quickstart --algorithm ddpo --seed {preset.run.seed}" if preset.model.base == "sandbox" else f"  tdpo sample base \"{prompt}\" --set model.base={preset.model.base}")


def job_prompt(preset: Preset) -> str:
    return prompts.load(preset.rollout.prompts)[0]
