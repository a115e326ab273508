"""How many bytes a run holds at a time, counted from its networks' configs. Standard library only: `--dry-run` imports no torch.

Every factor below was counted, not guessed: tensors saved for the backward pass, and tensors alive at the peak of a call,
of diffusers' networks at several widths and sizes (tests/unit/machine/test_memory.py counts them again). Where the base model is
not on this disk, its name says which published sizes are assumed, Stable Diffusion 1.x if nothing else. All of it is prediction.
"""

from __future__ import annotations

import json
import math
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
SDXL_ADAPTER_PER_RANK = 1_451_520
# flow transformers, by what their hub ids contain; the first that fits
SD3_PARTS = {"vae": 83.8e6, "text_encoder": 123.7e6, "text_encoder_2": 694.7e6, "text_encoder_3": 4.762e9}
SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "in_channels": 16, "patch_size": 2, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "patch_size": 1, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "guidance_embeds": True,
}  # fmt: skip
TRANSFORMERS = {
    "3.5-large": ({**SD3, "num_layers": 38, "num_attention_heads": 38, "qk_norm": "rms_norm"}, {**SD3_PARTS, "transformer": 8.0518e9}),
    "3.5-medium": ({**SD3, "dual_attention_layers": range(13), "qk_norm": "rms_norm"}, {**SD3_PARTS, "transformer": 2.2401e9}),
    "stable-diffusion-3": (SD3, {**SD3_PARTS, "transformer": 2.0253e9}),
    "flux": (FLUX, {"vae": 83.8e6, "text_encoder": 123.1e6, "text_encoder_2": 4.762e9, "transformer": 11.8992e9}),
}
ADAPTER_PER_RANK = 199_296  # LoRA parameters of Stable Diffusion 1.x per rank: 797,184 at rank 4
SCORER_BYTES = {"aesthetic": 1.71e9, "pickscore": 3.94e9, "hpsv2": 3.94e9, "hpsv2.1": 3.94e9, "imagereward": 1.79e9}  # fp32
SCORER_IMAGE_BYTES = 25e6  # activations of one image in a ViT-L or ViT-H, fp32
CRITIC_BYTES = 4 * 4 * 1.2e6  # weights, gradients and Adam's two moments
LIBRARIES = 0.83 * GiB  # a process with its libraries loaded, before any network (docs/performance.md)
CPU_COPIES = 2.0  # on a CPU: oneDNN's reordered copies and the allocator's gaps, measured there too
# of a quantised weight, by model.quantise; nf4 adds a number in fp32 for every 64
QUANTISED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
LARGE_TEXT = 1e9  # weights of a text encoder that is quantised too: T5 and Qwen have more, CLIP has fewer
CUDA_CONTEXT = 0.6 * GiB  # kernels and the libraries' workspaces on a GPU

# kept for the backward pass, per element of a feature map, in numbers of the compute type
RESNET, TRANSFORMER = 2.57, 28.4
# ... recomputed: each block keeps its input, and each transformer what is before and after its blocks
RESNET_CHECKPOINTED, TRANSFORMER_CHECKPOINTED, ENDS_CHECKPOINTED = 0.97, 1.0, 3.0
LINEAR_ENDS = 0.25  # of that with linear projections in place of convolutions
# ... and what a half-precision network adds for LoRA's fp32 inputs, in bytes per element of a transformer block
LORA_CAST = 20.0
# the same of a flow transformer, per element of its tokens, image and text together: a block with two streams as SD3's, what normalised queries
# and keys add, FLUX's blocks with two streams and with one; (numbers kept, LoRA's bytes in half precision)
JOINT, NORMALISED, FLUX_DOUBLE, FLUX_SINGLE = (12.1, 12.1), (2.0, 8.1), (19.1, 26.2), (12.1, 14.1)
TRANSFORMER_FORWARD = 17.5  # numbers alive at the peak of a call that keeps nothing
TEXT_TOKENS = {"SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512}
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Networks:
    """What the phases of an epoch need to know of a base model. Of one image, without guidance; numbers of the compute type."""

    parameters: dict[str, float]
    denoiser: str  # its name among the parameters
    latent_elements: int
    kept: float  # numbers that a call keeps for its backward pass
    kept_cast: float  # and bytes of LoRA's fp32 inputs, in half precision
    kept_checkpointed: float  # numbers that are kept where blocks are recomputed
    largest_block: float  # numbers that the largest block alone keeps
    largest_cast: float
    forward: float  # numbers alive at the peak of a call that keeps nothing
    forward_flops: float
    decode_flops: float
    adapter_per_rank: float  # LoRA's weights
    convolutions: float  # weights of the denoiser that no quantiser takes
    guides_by_input: bool  # the guidance scale is an input: one call, not two
    pixels: int
    vae_channels: int  # at full resolution
    vae_in_fp32: bool  # whatever the preset's dtype
    embedded: bool  # a small model on this disk, with small scorers


def networks(preset: Preset) -> Networks:
    """The preset's base model, read from its parts' configs and weight files; by its name where it is not on this disk."""
    base = ZOO / EMBEDDED[preset.model.base] if is_embedded(preset.model.base) else Path(preset.model.base).expanduser()
    xl, here = is_sdxl(base), (base / "model_index.json").is_file()
    known = next((one for word, one in TRANSFORMERS.items() if word in preset.model.base.lower()), None) if not here else None
    if known is not None:
        denoiser, parameters, vae = known[0], dict(known[1]), SD1_VAE
    else:
        denoiser, vae, parameters = (SDXL_UNET, SDXL_VAE, dict(SDXL_PARAMETERS)) if xl else (SD1_UNET, SD1_VAE, dict(SD1_PARAMETERS))
    name = "transformer" if known is not None or (base / "transformer" / "config.json").is_file() else "unet"
    if (base / name / "config.json").is_file():
        own = _read(base / name / "config.json", private=True)
        denoiser = own if name == "transformer" else {**SD1_UNET, **own}
        vae = {**SD1_VAE, **(_read(base / "vae" / "config.json") if (base / "vae" / "config.json").is_file() else {})}
        stored = {part.parent.name: stored_parameters(part.parent) for part in base.glob("*/config.json")}
        # of a part whose files are not safetensors the published size is left
        parameters = {part: stored.get(part) or parameters.get(part, 0.0) for part in {**parameters, **stored} if part in stored}
    if preset.model.drop_t5:
        parameters.pop("text_encoder_3", None)
    count, patch = counted_transformer if name == "transformer" else counted, 2 if name == "transformer" else 1
    if preset.model.resolution is not None:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        denoiser = {**denoiser, "sample_size": tuple(max(patch, side // factor) for side in preset.model.resolution)}
    upcast = xl and preset.model.vae is None and preset.model.dtype == "fp16" and bool(vae.get("force_upcast"))
    return count(denoiser, vae, parameters, upcast)


UNCOUNTED = ("qwen", "z-image", "flux.2", "flux2")  # what hub ids of models contain whose sizes no table here has


def guessed(preset: Preset) -> bool:
    """Whether the prediction is of another model's size, since this one's is not known before it is downloaded."""
    here = is_embedded(preset.model.base) or (Path(preset.model.base).expanduser() / "model_index.json").is_file()
    return not here and any(word in preset.model.base.lower() for word in UNCOUNTED)


def stored_parameters(folder: Path) -> int:
    """Weights in a part's safetensors files, by their headers: the plain files if there are any, else fp16's."""
    files = [file for file in folder.glob("*.safetensors") if "non_ema" not in file.name]
    plain = [file for file in files if ".fp16" not in file.name]
    return sum(_tensors(file) for file in plain or files)


def _tensors(file: Path) -> int:
    """Elements of a safetensors file; of a damaged one its size in half precision, since loading will name it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > 10**8:
            return file.stat().st_size // 2
        try:
            header = json.loads(opened.read(length))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return file.stat().st_size // 2


def is_sdxl(base: Path) -> bool:
    """By the folder's index, and by the name where there is no folder."""
    if (base / "model_index.json").is_file():
        return str(_read(base / "model_index.json", private=True).get("_class_name", "")).startswith("StableDiffusionXL")
    return "xl" in base.name.lower()


def counted(unet: dict[str, Any], vae: dict[str, Any], parameters: dict[str, float], vae_in_fp32: bool = False) -> Networks:
    """Walk the U as diffusers builds it: ResNets level by level down, the middle, and up with the skips."""
    height, width = _sides(unet["sample_size"])
    channels, layers, area = list(unet["block_out_channels"]), unet["layers_per_block"], height * width
    layers = layers if isinstance(layers, int) else max(layers)
    resnet = transformer = largest = flops = convolutions = 0
    ends = 0.0
    depths = unet.get("transformer_layers_per_block") or 1
    depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
    linear = LINEAR_ENDS if unet.get("use_linear_projection") and max(depths) > 1 else 1.0
    before, skips, held = channels[0], [channels[0]], channels[0] * area

    def block(entering: int, leaving: int, depth: int) -> None:
        nonlocal resnet, transformer, largest, ends, flops, convolutions
        attends = depth > 0
        resnet += (entering + leaving) * area
        transformer += leaving * area * depth
        ends += leaving * area * linear if attends else 0
        largest = max(largest, leaving * area if attends else 0)
        resnet_weights = 9 * leaving * (entering + leaving) + (entering != leaving) * entering * leaving
        convolutions += resnet_weights + (0 if unet.get("use_linear_projection") else attends * 2 * leaving**2)
        flops += 2 * area * resnet_weights
        # self-attention, cross-attention, a gated feed-forward; the projections at a transformer's ends
        flops += 2 * area * (depth * (18 * leaving**2 + 2 * leaving * (area + CLIP_TOKENS)) + attends * 2 * leaving**2)

    for level, (width_, kind) in enumerate(zip(channels, unet["down_block_types"], strict=True)):
        for _ in range(layers):
            block(before, width_, depths[level] if "CrossAttn" in kind else 0)
            before = width_
            skips.append(width_)
            held += width_ * area
        if level < len(channels) - 1:
            area //= 4
            flops += 2 * area * 9 * width_**2
            convolutions += 9 * width_**2
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
            flops += 2 * area * 9 * width_**2
            convolutions += 9 * width_**2
    per_rank, published = (SDXL_ADAPTER_PER_RANK, SDXL_PARAMETERS) if "text_encoder_2" in parameters else (ADAPTER_PER_RANK, SD1_PARAMETERS)
    block_bytes = max(21 * largest, 8 * channels[0] * height * width)
    return Networks(
        parameters=parameters,
        denoiser="unet",
        latent_elements=unet["in_channels"] * height * width,
        kept=resnet * RESNET + transformer * TRANSFORMER,
        kept_cast=transformer * LORA_CAST,
        kept_checkpointed=resnet * RESNET_CHECKPOINTED + transformer * TRANSFORMER_CHECKPOINTED + ends * ENDS_CHECKPOINTED,
        largest_block=block_bytes / 21 * TRANSFORMER,
        largest_cast=block_bytes / 21 * LORA_CAST,
        forward=held + block_bytes,
        forward_flops=flops,
        adapter_per_rank=per_rank * min(1.0, parameters["unet"] / published["unet"] * 20),
        convolutions=convolutions,
        guides_by_input=False,
        vae_in_fp32=vae_in_fp32,
        embedded=sum(parameters.values()) < 50e6,
        **_decoder(vae, height, width),
    )


def counted_transformer(net: dict[str, Any], vae: dict[str, Any], parameters: dict[str, float], vae_in_fp32: bool = False) -> Networks:
    """A flow transformer as SD3's or FLUX's: every block computes with all tokens of the image and of the prompt."""
    if "n_layers" in net:  # Z-Image names them differently
        layers = net["n_layers"] + 2 * net.get("n_refiner_layers", 0)
        own = {"num_layers": layers, "num_attention_heads": net["n_heads"], "attention_head_dim": net["dim"] // net["n_heads"]}
        net = {**net, **own, "patch_size": min(net.get("all_patch_size") or (2,))}
    flux = str(net.get("_class_name", "")).startswith("Flux")
    height, width = _sides(net.get("sample_size") or 128)  # FLUX's configs have none; its pipeline's size is 128
    patch = 2 if flux else net["patch_size"]  # FLUX packs 2 x 2 latents itself
    tokens, channels = height // patch * (width // patch), net["attention_head_dim"] * net["num_attention_heads"]
    both = tokens + TEXT_TOKENS.get(str(net.get("_class_name")), 512)
    double, single, dual = net["num_layers"], net.get("num_single_layers", 0), len(net.get("dual_attention_layers") or ())
    kept, cast = FLUX_DOUBLE if flux else tuple(a + b for a, b in zip(JOINT, NORMALISED, strict=True)) if net.get("qk_norm") else JOINT
    elements = both * channels
    # four products of attention and the feed-forward's eight; the scores and what they weigh
    flops = 2 * (double + single) * (12 * channels**2 * both + 2 * channels * both**2)
    flops += 2 * dual * (4 * channels**2 * tokens + 2 * channels * tokens**2)
    # the families' LoRA per rank, input and output channels of each product: SD3's eight of attention (the last block has seven); FLUX's
    # and four of the feed-forwards, and three where a block has one stream
    adapter = (36 * double + 6 * single if flux else 16 * double - 2) * channels
    return Networks(
        parameters=parameters,
        denoiser="transformer",
        latent_elements=net["in_channels"] // (4 if flux else 1) * height * width,
        kept=elements * (double * kept + single * FLUX_SINGLE[0]),
        kept_cast=elements * (double * cast + single * FLUX_SINGLE[1]),
        kept_checkpointed=elements * (double + single + 1.0),
        largest_block=elements * kept,
        largest_cast=elements * cast,
        forward=elements * TRANSFORMER_FORWARD,
        forward_flops=flops,
        adapter_per_rank=adapter,
        convolutions=0,
        guides_by_input=flux and bool(net.get("guidance_embeds")),
        vae_in_fp32=vae_in_fp32,
        embedded=sum(parameters.values()) < 50e6,
        **_decoder(vae, height, width),
    )


def _sides(side: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return height, width


def _decoder(vae: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """What a VAE makes of latents: pixels, its width at full resolution, floating-point operations of one image."""
    channels = list(vae["block_out_channels"])
    area, before = height * width, channels[-1]
    flops = 2 * area * (2 * 18 * before**2 + 4 * before**2 + 2 * before * area)  # the middle: two ResNets and an attention
    for level, leaving in enumerate(reversed(channels)):
        for _ in range(vae.get("layers_per_block", 2) + 1):
            flops += 2 * area * (9 * leaving * (before + leaving) + (before != leaving) * before * leaving)
            before = leaving
        if level < len(channels) - 1:
            area *= 4
            flops += 2 * area * 9 * leaving**2
    return {"pixels": area, "vae_channels": channels[min(1, len(channels) - 1)], "decode_flops": float(flops)}


# --- one call ---------------------------------------------------------------------------------------------------------
def backward_bytes(nets: Networks, size: int, checkpointing: bool) -> float:
    """What one image's call of the denoiser keeps for its backward pass, without guidance; `size` bytes per number."""
    half = size < 4
    if not checkpointing:
        return nets.kept * size + nets.kept_cast * half
    return (nets.kept_checkpointed + nets.largest_block) * size + nets.largest_cast * half  # one block is computed again at a time


def forward_bytes(nets: Networks, size: int) -> float:
    """Alive at the peak of one image's call of the denoiser that keeps nothing."""
    return nets.forward * size


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
    """Networks, and fp32 weights that train with their gradients, Adam's two moments and a moving average where there is one."""
    whole, denoiser = sum(nets.parameters.values()), nets.parameters[nets.denoiser]
    each = 16 + 4 * (preset.update.ema_decay > 0)
    if preset.model.lora_rank == 0:
        reference = denoiser * size if preset.needs_reference else 0
        return (whole - denoiser) * size + denoiser * each + reference + CRITIC_BYTES
    return whole * size - saved_bytes(preset, nets, size) + nets.adapter_per_rank * preset.model.lora_rank * each + CRITIC_BYTES


def saved_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """What model.quantise saves: of the denoiser's linear layers, and of large text encoders, whose embeddings are counted with them."""
    if preset.model.quantise is None:
        return 0.0
    large = sum(count for name, count in nets.parameters.items() if name.startswith("text_encoder") and count > LARGE_TEXT)
    linear = max(0.0, nets.parameters[nets.denoiser] - nets.convolutions)
    return (linear + large) * (size - QUANTISED_BYTES[preset.model.quantise])


# --- one epoch ----------------------------------------------------------------------------------------------------------
def epoch_flops(preset: Preset) -> float:
    """Floating-point operations of an epoch: denoiser and VAE. The text encoders and rewards are small beside them and not counted."""
    nets, samples = networks(preset), preset.rollout.samples_per_epoch
    guided = calls(preset, nets)
    # the gradient goes through all products once more, and once again for weights that train
    passes = (3 if preset.model.lora_rank == 0 else 2) * preset.update.inner_epochs * preset.trained_steps
    trained = passes * (guided if preset.update.guidance else 1)
    states = preset.stochastic_steps if preset.has_critic and preset.algorithm.critic_view == "decode" else 0
    return samples * (nets.forward_flops * (preset.rollout.steps * guided + trained) + nets.decode_flops * (states + 1))


def calls(preset: Preset, nets: Networks) -> int:
    """Calls of the denoiser per step: two where classifier-free guidance is on."""
    return 2 if preset.rollout.guidance_scale > 1 and not nets.guides_by_input else 1


def _read(path: Path, private: bool = False) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if private or not key.startswith("_")}
