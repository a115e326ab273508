"""What a run writes after an epoch: checkpoint, preview and state; and what it ran on."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tdpo_cli import __version__
from tdpo_cli.machine import memory
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.randomness import Randomness
from tdpo_cli.report.model_card import model_card
from tdpo_cli.sampling import grid
from tdpo_cli.sampling.generate import generate
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train.state import Job

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "numpy", "pillow")


def save(job: Job, folder: RunDir, epoch: int, row: dict[str, Any], last: bool) -> None:
    """The order matters: a state on disk means that its metrics row and its checkpoint are there too. On the main process."""
    folder.still_there()
    run, digest = job.preset.run, job.preset.digest()
    folder.log(row)
    if (epoch + 1) % run.save_every == 0 or last:
        rows, spare = folder.read_metrics(), None
        if run.stop_on_overoptimisation is not None:
            spare = verdict.best(rows, job.preset, [*folder.saved_epochs(), epoch])
        folder.save_checkpoint(epoch, lambda path: _write_checkpoint(job, path, rows), digest, run.keep_last, spare)
    folder.save_state(epoch, job.state_dict(), digest)


def _write_checkpoint(job: Job, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with job.optimizers.averaged():
        job.policy.save(path)
    if job.critic is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in job.critic.state_dict().items()}, path / "critic.safetensors")
    (path / "README.md").write_text(model_card(job.preset, rows, job.prompts, job.policy.family.component), encoding="utf-8")


def preview(job: Job, folder: RunDir, title: str, file: str) -> None:
    """Fixed prompts and fixed noise, apart from training: what changes from epoch to epoch is the policy alone.

    The main process draws them. Of a sharded policy all processes compute, since each holds a part of the weights.
    """
    if not (job.world.is_main or job.policy.sharded):
        return
    count = job.preset.run.preview_images
    if count == 0:
        return
    shown, how, plan = [job.prompts[i % len(job.prompts)] for i in range(count)], job.preset.shown, job.plan
    policy, noise = job.policy.scheduled(how.steps, how.noise), Randomness(job.preset.run.seed, "preview")
    batches = generate(policy, shown, range(count), noise, how.guidance_scale, plan.sample_batch, decode_chunk=plan.decode_chunk)
    with job.optimizers.averaged():
        images = [grid.to_pil(image) for batch in batches for image in batch]
    if job.world.is_main:
        folder.save_image(file, grid.draw(images, shown, columns=min(count, 4), title=title))


def environment(job: Job, first_epoch: int) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # with the build, cu130 or cpu
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
        "micro_batch": job.plan.micro_batch,
        "plan": job.plan.as_dict(),
        "memory_limit": job.preset.run.memory_limit,
        "predicted_memory_bytes": memory.estimate(job.preset, job.world.size, job.plan, device.type == "cuda"),
    }
