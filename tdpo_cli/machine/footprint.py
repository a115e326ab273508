"""How many bytes a run holds at a time, counted from its networks' configs. Standard library only: `--dry-run` imports no torch.

Every factor below was counted, not guessed: tensors saved for the backward pass, and tensors alive at the peak of a call,
of diffusers' networks at several widths and sizes (tests/unit/machine/test_memory.py counts them again). Where the base model is
not on this disk, the published sizes are assumed: of SDXL where the name has an "xl", else of Stable Diffusion 1.x. All of it is prediction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo_cli.config.preset import Preset
from tdpo_cli.sandbox import EMBEDDED, ZOO, is_embedded

GiB = 1024**3
SD1_PARAMETERS = {"unet": 860e6, "vae": 84e6, "text_encoder": 123e6}
SD1_UNET = {
    "sample_size": 64, "in_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD1_VAE = {"block_out_channels": (128, 256, 512, 512)}
# Stable Diffusion XL
SDXL_PARAMETERS = {"unet": 2567.5e6, "vae": 83.7e6, "text_encoder": 123.1e6, "text_encoder_2": 694.7e6}
SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
}  # fmt: skip
SDXL_VAE = {**SD1_VAE, "force_upcast": True}
CLIP_TOKENS, T5_TOKENS = 77, 256
SDXL_ADAPTER_PER_RANK = 1_451_520
ADAPTER_PER_RANK = 199_296  # LoRA parameters of Stable Diffusion 1.x per rank: 797,184 at rank 4
SCORER_BYTES = {"aesthetic": 1.71e9, "pickscore": 3.94e9, "hpsv2": 3.94e9, "hpsv2.1": 3.94e9, "imagereward": 1.79e9}  # fp32
SCORER_IMAGE_BYTES = 25e6  # activations of one image in a ViT-L or ViT-H, fp32
CRITIC_BYTES = 4 * 4 * 1.2e6  # weights, gradients and Adam's two moments
LIBRARIES = 0.83 * GiB  # a process with its libraries loaded, before any network (docs/performance.md)
CPU_COPIES = 2.0  # on a CPU: oneDNN's reordered copies and the allocator's gaps, measured there too
CUDA_CONTEXT = 0.6 * GiB  # kernels and the libraries' workspaces on a GPU

# kept for the backward pass, per element of a feature map, in numbers of the compute type
RESNET, TRANSFORMER = 2.57, 28.4
JOINT, DUAL = 14.0, 5.5  # a block over picture and text together, as Stable Diffusion 3's, and its second attention over the picture
# ... recomputed: each block keeps its input, and each transformer what is before and after its blocks
RESNET_CHECKPOINTED, TRANSFORMER_CHECKPOINTED, ENDS_CHECKPOINTED = 0.97, 1.0, 3.0
LINEAR_ENDS = 0.25  # of that with linear projections in place of convolutions
# ... and what a half-precision network adds for LoRA's fp32 inputs, in bytes per element of a transformer block
LORA_CAST = 20.0


@dataclass(frozen=True)
class Networks:
    """What the phases of an epoch need to know of a base model. Elements are of one image, without guidance."""

    parameters: dict[str, float]
    latent_elements: int
    resnet_elements: int  # inputs and outputs of all ResNet blocks
    transformer_elements: float  # hidden states of all transformer blocks
    transformer_ends: float  # of all transformers, each of several blocks
    largest_block: int  # of the largest transformer or ResNet block's
    skip_elements: int  # what the decoder half waits for
    pixels: int
    vae_channels: int  # at full resolution
    vae_in_fp32: bool  # whatever the preset's dtype
    embedded: bool  # a small model on this disk, with small scorers
    kept: float = TRANSFORMER  # numbers per element of a transformer block


def networks(preset: Preset) -> Networks:
    """The preset's base model, read from its configs; Stable Diffusion 1.x where they are not on this disk."""
    name = preset.model.base
    base = ZOO / EMBEDDED[name] if is_embedded(name) else Path(name).expanduser()
    if (base / "transformer" / "config.json").is_file():
        return joint(base, preset)
    xl = is_sdxl(base)
    unet, vae, parameters = (SDXL_UNET, SDXL_VAE, dict(SDXL_PARAMETERS)) if xl else (SD1_UNET, SD1_VAE, dict(SD1_PARAMETERS))
    if (base / "unet" / "config.json").is_file():
        unet = {**SD1_UNET, **_read(base / "unet" / "config.json")}
        vae = {**SD1_VAE, **(_read(base / "vae" / "config.json") if (base / "vae" / "config.json").is_file() else {})}
        for part in parameters:
            stored = sum(file.stat().st_size for file in (base / part).glob("*.safetensors"))
            parameters[part] = stored / 2 if stored else parameters[part]  # fp16 files
    if preset.model.resolution is not None:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        unet = {**unet, "sample_size": tuple(side // factor for side in preset.model.resolution)}
    upcast = xl and preset.model.vae is None and preset.model.dtype == "fp16" and bool(vae.get("force_upcast"))
    return counted(unet, vae, parameters, upcast)


def joint(base: Path, preset: Preset) -> Networks:
    """A transformer over the tokens of picture and text together, by its folder; counted on Stable Diffusion 3's."""
    config, vae = _read(base / "transformer" / "config.json"), {**SD1_VAE, **_read(base / "vae" / "config.json")}
    vae_channels = list(vae["block_out_channels"])
    scale = 2 ** (len(vae_channels) - 1)
    size = preset.model.resolution or (config.get("sample_size", 128) * scale,) * 2
    height, width = (side // scale for side in size)
    picture = height * width // config.get("patch_size", 2) ** 2
    # without T5, fp32 networks take its zeros as one token
    merged = preset.model.dtype == "fp32" and (preset.model.drop_t5 or not (base / "text_encoder_3").is_dir())
    clip = _read(base / "text_encoder" / "config.json").get("max_position_embeddings", CLIP_TOKENS)
    tokens, channels = picture + clip + (1 if merged else T5_TOKENS), config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config.get("num_single_layers", 0)
    second = len(config.get("dual_attention_layers") or ()) * picture
    parameters = {
        "unet" if folder.name == "transformer" else folder.name: sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
        for folder in base.iterdir()
        if (folder / "config.json").is_file()
    }
    return Networks(
        parameters=parameters,
        latent_elements=vae.get("latent_channels", 16) * height * width,
        resnet_elements=0,
        transformer_elements=(tokens * blocks + second * DUAL / JOINT) * channels,
        transformer_ends=0.0,
        largest_block=21 * tokens * channels,
        skip_elements=0,
        pixels=height * width * scale**2,
        vae_channels=vae_channels[min(1, len(vae_channels) - 1)],
        vae_in_fp32=False,
        embedded=sum(parameters.values()) < 50e6,
        kept=JOINT,
    )


def is_sdxl(base: Path) -> bool:
    """By the folder's index, and by the name where there is no folder."""
    if (base / "model_index.json").is_file():
        return str(_read(base / "model_index.json", private=True).get("_class_name", "")).startswith("StableDiffusionXL")
    return "xl" in base.name.lower()


def counted(unet: dict[str, Any], vae: dict[str, Any], parameters: dict[str, float], vae_in_fp32: bool = False) -> Networks:
    """Walk the U as diffusers builds it: ResNets level by level down, the middle, and up with the skips."""
    side = unet["sample_size"]
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels, layers, area = list(unet["block_out_channels"]), unet["layers_per_block"], height * width
    layers = layers if isinstance(layers, int) else max(layers)
    resnet = transformer = largest = 0
    ends = 0.0
    depths = unet.get("transformer_layers_per_block") or 1
    depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
    linear = LINEAR_ENDS if unet.get("use_linear_projection") and max(depths) > 1 else 1.0
    before, skips, held = channels[0], [channels[0]], channels[0] * area

    def block(entering: int, leaving: int, depth: int) -> None:
        nonlocal resnet, transformer, largest, ends
        attends = depth > 0
        resnet += (entering + leaving) * area
        transformer += leaving * area * depth
        ends += leaving * area * linear if attends else 0
        largest = max(largest, leaving * area if attends else 0)

    for level, (width_, kind) in enumerate(zip(channels, unet["down_block_types"], strict=True)):
        for _ in range(layers):
            block(before, width_, depths[level] if "CrossAttn" in kind else 0)
            before = width_
            skips.append(width_)
            held += width_ * area
        if level < len(channels) - 1:
            area //= 4
            skips.append(width_)
            held += width_ * area
    block(before, before, depths[-1])
    block(before, before, 0)
    for level, (width_, kind) in enumerate(zip(reversed(channels), unet["up_block_types"], strict=True)):
        for _ in range(layers + 1):
            block(before + skips.pop(), width_, depths[-1 - level] if "CrossAttn" in kind else 0)
            before = width_
        if level < len(channels) - 1:
            area *= 4
    vae_channels = list(vae["block_out_channels"])
    scale = 2 ** (len(vae_channels) - 1)
    return Networks(
        parameters=parameters,
        latent_elements=unet["in_channels"] * height * width,
        resnet_elements=resnet,
        transformer_elements=transformer,
        transformer_ends=ends,
        largest_block=max(21 * largest, 8 * channels[0] * height * width),
        skip_elements=held,
        pixels=height * width * scale**2,
        vae_channels=vae_channels[min(1, len(vae_channels) - 1)],
        vae_in_fp32=vae_in_fp32,
        embedded=sum(parameters.values()) < 50e6,
    )


# --- one call ---------------------------------------------------------------------------------------------------------
def backward_bytes(nets: Networks, size: int, checkpointing: bool) -> float:
    """What one image's UNet call keeps for its backward pass, without guidance; `size` bytes per number."""
    cast = LORA_CAST if size < 4 else 0.0
    if not checkpointing:
        return nets.resnet_elements * RESNET * size + nets.transformer_elements * (nets.kept * size + cast)
    transformers = nets.transformer_elements * TRANSFORMER_CHECKPOINTED + nets.transformer_ends * ENDS_CHECKPOINTED
    kept = (nets.resnet_elements * RESNET_CHECKPOINTED + transformers) * size
    return kept + nets.largest_block / 21 * (nets.kept * size + cast)  # one block is computed again at a time


def forward_bytes(nets: Networks, size: int) -> float:
    """Alive at the peak of one image's UNet call that keeps nothing."""
    return (nets.skip_elements + nets.largest_block) * size


def decode_bytes(nets: Networks, size: int) -> float:
    """Alive at the peak of decoding one image: three maps of the last level's input width at full resolution, and the picture."""
    return nets.pixels * (3 * nets.vae_channels * (4 if nets.vae_in_fp32 else size) + 2 * 3 * 4)


def trajectory_bytes(preset: Preset, nets: Networks, processes: int) -> float:
    """Of this process' samples every latent in fp32 and a critic's embedding per step; of the others' the embeddings, and latents that visit."""
    every, columns, width = preset.rollout.samples_per_epoch, preset.stochastic_steps, 64 if nets.embedded else 1024
    own = -(-every // processes)
    travel = processes > 1 and (preset.update.inner_epochs > 1 or preset.update.batch_size % processes > 0)
    latents = own * (1 + travel) * (columns + 1) * nets.latent_elements * 4
    embeds = (own + every * (processes > 1)) * columns * (width + preset.critic_beside) * 4 * preset.has_critic
    return latents + embeds


def clean_bytes(preset: Preset, nets: Networks, processes: int) -> float:
    """Of this process' samples the clean image predicted at every trained step, in fp32, until the critic has seen it."""
    own = -(-preset.rollout.samples_per_epoch // processes)
    return own * preset.stochastic_steps * nets.latent_elements * 4 * (preset.has_critic and preset.critic_beside)


def scorer_bytes(preset: Preset, nets: Networks) -> float:
    return 4 * sum(nets.parameters.values()) if nets.embedded else sum(SCORER_BYTES.get(name, 0) for name in preset.rewards)


def largest_scorers(preset: Preset, nets: Networks) -> tuple[float, float]:
    """(the critic's encoder, the largest reward), where one at a time is on the device."""
    if nets.embedded:
        return scorer_bytes(preset, nets), scorer_bytes(preset, nets)
    eye = preset.reward.train if preset.reward.train in ("pickscore", "hpsv2", "hpsv2.1") else "aesthetic"
    return SCORER_BYTES[eye] * preset.has_critic, max(SCORER_BYTES.get(name, 0) for name in preset.rewards)


def weight_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """Networks, and fp32 weights that train with their gradients and Adam's two moments."""
    whole = sum(nets.parameters.values())
    if preset.model.lora_rank == 0:
        reference = nets.parameters["unet"] * size if preset.needs_reference else 0
        return (whole - nets.parameters["unet"]) * size + nets.parameters["unet"] * 16 + reference + CRITIC_BYTES
    xl = "text_encoder_2" in nets.parameters
    per_rank, published = (SDXL_ADAPTER_PER_RANK, SDXL_PARAMETERS["unet"]) if xl else (ADAPTER_PER_RANK, SD1_PARAMETERS["unet"])
    adapter = per_rank * preset.model.lora_rank * min(1.0, nets.parameters["unet"] / published * 20)
    return whole * size + adapter * 16 + CRITIC_BYTES


def _read(path: Path, private: bool = False) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if private or not key.startswith("_")}
