"""How much memory a run needs and how large a micro-batch fits. Standard library only: `--dry-run` imports no torch.

An estimate from the sizes of the networks' files and a few constants, each with its origin; where the base model is not
on this disk, Stable Diffusion 1.x at 512 pixels is assumed.
"""

from __future__ import annotations

import json
from pathlib import Path

from tdpo_cli.preset import Preset

GiB = 1024**3
SD1_WEIGHTS = 860e6 + 84e6 + 123e6  # parameters of UNet, VAE and text encoder
SD1_ADAPTER_PER_RANK = 199_296  # LoRA parameters per rank: 797,184 at rank 4
SCORER_BYTES = {"aesthetic": 1.71e9, "pickscore": 3.94e9, "hpsv2": 3.94e9, "hpsv2.1": 3.94e9, "imagereward": 1.79e9}  # fp32
CRITIC_BYTES = 4 * 4 * 1.2e6  # weights, gradients and Adam's moments
# activations kept for the backward pass, bytes per latent element and byte of compute type, guidance doubled
ACTIVATION_FACTOR = 45_000
CPU_MICRO_BATCH = 48  # larger gains nothing on a CPU


def estimate(preset: Preset, processes: int = 1, micro_batch: int = 4) -> int:
    """Bytes at the peak of one process: weights, adapter with its optimizer, scorers, trajectory, activations."""
    size = 4 if preset.model.dtype == "fp32" else 2
    parameters, latent_elements, embedded = _base_model(preset)
    adapter = SD1_ADAPTER_PER_RANK * preset.model.lora_rank if preset.model.lora_rank else SD1_WEIGHTS
    if embedded:
        adapter, scorers = parameters * 0.05, parameters * 4
    else:
        scorers = sum(SCORER_BYTES.get(name, 0) for name in preset.rewards)
    samples = -(-preset.rollout.samples_per_epoch // processes)
    trajectory = samples * (preset.rollout.steps + 1) * latent_elements * 4
    guided = 2 if preset.rollout.guidance_scale > 1 else 1
    activations = micro_batch * guided * latent_elements * ACTIVATION_FACTOR / 4 * size
    runtime = 0.6 * GiB  # interpreter, libraries, allocator
    return int(parameters * size + adapter * 16 + scorers + CRITIC_BYTES + trajectory + activations + runtime)


def micro_batch(preset: Preset, free_bytes: int | None, processes: int = 1) -> int:
    """The largest power of two whose estimate fits; without a known limit (a CPU) a fixed one."""
    if preset.run.micro_batch is not None:
        return preset.run.micro_batch
    if free_bytes is None:
        return CPU_MICRO_BATCH
    size = 1
    while size < 64 and estimate(preset, processes, 2 * size) < 0.9 * free_bytes:
        size *= 2
    return size


def exhausted(error: BaseException) -> bool:
    """Whether this is what a GPU, a CPU's allocator or Python says when memory runs out."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def advice(preset: Preset, micro_batch: int) -> str:
    """Which settings to lower, those first that leave the result as it is."""
    ways = []
    if micro_batch > 1:
        ways.append(f"run.micro_batch={max(1, micro_batch // 2)} (it is {micro_batch}; the result stays the same)")
    if preset.model.dtype == "fp32":
        ways.append("model.dtype=fp16 (on a GPU)")
    if preset.model.lora_rank == 0:
        ways.append("model.lora_rank=4 instead of the whole UNet")
    if preset.reward.watch:
        ways.append("fewer rewards in reward.watch")
    ways.append(f"rollout.samples_per_epoch (it is {preset.rollout.samples_per_epoch}), or share them among more processes")
    return "Lower, in this order: " + "; ".join(ways) + "."


def _base_model(preset: Preset) -> tuple[float, int, bool]:
    """(parameters, elements of a latent, whether it is a local small model)"""
    base = Path(__file__).parent / "sandbox/zoo/pipeline" if preset.model.base == "sandbox" else Path(preset.model.base)
    config = base / "unet" / "config.json"
    if not config.is_file():
        return SD1_WEIGHTS, 4 * 64 * 64, False
    unet = json.loads(config.read_text())
    side = unet.get("sample_size", 64)
    height, width = side if isinstance(side, list) else (side, side)
    weights = [file for part in ("unet", "vae", "text_encoder") for file in (base / part).glob("*.safetensors")]
    parameters = sum(file.stat().st_size for file in weights) / 2  # fp16 files
    return parameters or SD1_WEIGHTS, unet.get("in_channels", 4) * height * width, parameters < 50e6
