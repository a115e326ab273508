"""What networks hold and compute, counted from their configs. Standard library only.

Every factor was counted, not guessed: tensors saved for the backward pass, and tensors alive at the peak of a call, of diffusers' networks
at several widths and sizes (tests/unit/machine/test_memory.py counts them again).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tdpo_cli.machine.published import ADAPTER_PER_RANK, SD1_PARAMETERS, SDXL_ADAPTER_PER_RANK, SDXL_PARAMETERS

# kept for the backward pass, per element of a feature map, in numbers of the compute type
RESNET, TRANSFORMER = 2.57, 28.4
# ... recomputed: each block keeps its input, and each transformer what is before and after its blocks
RESNET_CHECKPOINTED, TRANSFORMER_CHECKPOINTED, ENDS_CHECKPOINTED = 0.97, 1.0, 3.0
LINEAR_ENDS = 0.25  # of that with linear projections in place of convolutions
# ... and what a half-precision network adds for LoRA's fp32 inputs, in bytes per element of a transformer block
LORA_CAST = 20.0
NORMALISED = (2.0, 8.1)  # what normalised queries and keys add to a block of Stable Diffusion 3
TEXT_TOKENS = {"SD3Transformer2DModel": 333}  # of a prompt; the others' are padded to 512, or at most that long as a rule
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Kind:
    """A flow transformer's blocks, per element of its tokens, image and text together: those with two streams, or all; those with one."""

    double: tuple[float, float]  # numbers that a block keeps for the backward pass, and bytes of LoRA's fp32 inputs in half precision
    single: tuple[float, float] = (0.0, 0.0)
    adapter: tuple[int, int] = (16, 0)  # LoRA's weights per rank and channel of a block, for the family's targets
    forward: float = 17.5  # numbers alive at the peak of a call that keeps nothing
    products: int = 12  # weights of a block's products, in squares of the channels: four of attention, the rest the feed-forward's
    packed: bool = True  # its channels are those of 2 x 2 latents


KINDS = {
    "SD3Transformer2DModel": Kind((12.1, 12.1), packed=False),
    "FluxTransformer2DModel": Kind((19.1, 26.2), (12.1, 14.1), adapter=(36, 6)),
    "Flux2Transformer2DModel": Kind((18.4, 12.2), (21.1, 18.1), adapter=(8, 15), forward=22.8, products=13),
    "ZImageTransformer2DModel": Kind((19.1, 38.2), adapter=(8, 0), packed=False),
    "QwenImageTransformer2DModel": Kind((19.2, 30.3), adapter=(36, 0)),
}


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


# --- a UNet -------------------------------------------------------------------------------------------------------------
class _Walk:
    """Sums over the blocks of a UNet, of one image; `area` is that of the level."""

    def __init__(self, unet: dict[str, Any], channels: list[int], area: int, linear_ends: float):
        self.linear_products, self.linear_ends = bool(unet.get("use_linear_projection")), linear_ends
        self.area, self.before = area, channels[0]
        self.skips, self.held = [channels[0]], channels[0] * area
        self.resnet = self.transformer = self.largest = self.flops = self.convolutions = 0
        self.ends = 0.0

    def block(self, entering: int, leaving: int, depth: int) -> None:
        """A ResNet, and a transformer of that depth."""
        area, attends = self.area, depth > 0
        self.resnet += (entering + leaving) * area
        self.transformer += leaving * area * depth
        self.ends += leaving * area * self.linear_ends if attends else 0
        self.largest = max(self.largest, leaving * area if attends else 0)
        weights = 9 * leaving * (entering + leaving) + (entering != leaving) * entering * leaving
        self.convolutions += weights + (0 if self.linear_products else attends * 2 * leaving**2)
        self.flops += 2 * area * weights
        # self-attention, cross-attention, a gated feed-forward; the projections at a transformer's ends
        self.flops += 2 * area * (depth * (18 * leaving**2 + 2 * leaving * (area + CLIP_TOKENS)) + attends * 2 * leaving**2)
        self.before = leaving

    def keep(self) -> None:
        """For the way up."""
        self.skips.append(self.before)
        self.held += self.before * self.area

    def resample(self, area: int) -> None:
        self.area = area
        self.flops += 2 * area * 9 * self.before**2
        self.convolutions += 9 * self.before**2


def _walk(unet: dict[str, Any], channels: list[int], area: int) -> _Walk:
    """Through the U as diffusers builds it: ResNets level by level down, the middle, and up with the skips."""
    layers, depths = unet["layers_per_block"], unet.get("transformer_layers_per_block") or 1
    layers = layers if isinstance(layers, int) else max(layers)
    depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
    walk = _Walk(unet, channels, area, LINEAR_ENDS if unet.get("use_linear_projection") and max(depths) > 1 else 1.0)
    for level, (width, kind) in enumerate(zip(channels, unet["down_block_types"], strict=True)):
        for _ in range(layers):
            walk.block(walk.before, width, depths[level] if "CrossAttn" in kind else 0)
            walk.keep()
        if level < len(channels) - 1:
            walk.resample(walk.area // 4)
            walk.keep()
    walk.block(walk.before, walk.before, depths[-1])
    walk.block(walk.before, walk.before, 0)
    for level, (width, kind) in enumerate(zip(reversed(channels), unet["up_block_types"], strict=True)):
        for _ in range(layers + 1):
            walk.block(walk.before + walk.skips.pop(), width, depths[-1 - level] if "CrossAttn" in kind else 0)
        if level < len(channels) - 1:
            walk.resample(walk.area * 4)
    return walk


def counted(unet: dict[str, Any], vae: dict[str, Any], parameters: dict[str, float], vae_in_fp32: bool = False) -> Networks:
    """A UNet as Stable Diffusion's, its VAE, and the weights of every part."""
    (height, width), channels = _sides(unet["sample_size"]), list(unet["block_out_channels"])
    walk = _walk(unet, channels, height * width)
    per_rank, published = (SDXL_ADAPTER_PER_RANK, SDXL_PARAMETERS) if "text_encoder_2" in parameters else (ADAPTER_PER_RANK, SD1_PARAMETERS)
    block_bytes = max(21 * walk.largest, 8 * channels[0] * height * width)
    return Networks(
        parameters=parameters,
        denoiser="unet",
        latent_elements=unet["in_channels"] * height * width,
        kept=walk.resnet * RESNET + walk.transformer * TRANSFORMER,
        kept_cast=walk.transformer * LORA_CAST,
        kept_checkpointed=walk.resnet * RESNET_CHECKPOINTED + walk.transformer * TRANSFORMER_CHECKPOINTED + walk.ends * ENDS_CHECKPOINTED,
        largest_block=block_bytes / 21 * TRANSFORMER,
        largest_cast=block_bytes / 21 * LORA_CAST,
        forward=walk.held + block_bytes,
        forward_flops=walk.flops,
        adapter_per_rank=per_rank * min(1.0, parameters["unet"] / published["unet"] * 20),
        convolutions=walk.convolutions,
        guides_by_input=False,
        vae_in_fp32=vae_in_fp32,
        embedded=sum(parameters.values()) < 50e6,
        **_decoder(vae, height, width),
    )


# --- a flow transformer -------------------------------------------------------------------------------------------------
def counted_transformer(net: dict[str, Any], vae: dict[str, Any], parameters: dict[str, float], vae_in_fp32: bool = False) -> Networks:
    """A flow transformer of one of KINDS: every block computes with all tokens of the image and of the prompt."""
    refiners = net.get("n_refiner_layers", 0)
    if "n_layers" in net:  # Z-Image names them differently; its refiners work in pairs, one on the image and one on the prompt
        layers = net["n_layers"] + refiners
        own = {"num_layers": layers, "num_attention_heads": net["n_heads"], "attention_head_dim": net["dim"] // net["n_heads"]}
        net = {**net, **own, "patch_size": min(net.get("all_patch_size") or (2,))}
    name = str(net.get("_class_name"))
    kind, sd3 = KINDS.get(name, KINDS["SD3Transformer2DModel"]), name not in KINDS or name.startswith("SD3")
    height, width = _sides(net.get("sample_size") or 128)  # the others' configs have none; their pipelines' size is 128
    patch = 2 if kind.packed else net["patch_size"]
    tokens, channels = height // patch * (width // patch), net["attention_head_dim"] * net["num_attention_heads"]
    both = tokens + TEXT_TOKENS.get(name, 512)
    double, single, dual = net["num_layers"], net.get("num_single_layers", 0), len(net.get("dual_attention_layers") or ())
    kept, cast = kind.double
    if sd3 and net.get("qk_norm"):
        kept, cast = kept + NORMALISED[0], cast + NORMALISED[1]
    elements = both * channels
    # the products; attention's scores and what they weigh
    flops = 2 * (double + single) * (kind.products * channels**2 * both + 2 * channels * both**2)
    flops += 2 * dual * (4 * channels**2 * tokens + 2 * channels * tokens**2)
    largest = max(kind.double, kind.single) if not sd3 else (kept, cast)
    return Networks(
        parameters=parameters,
        denoiser="transformer",
        latent_elements=net["in_channels"] // (4 if kind.packed else 1) * height * width,
        kept=elements * (double * kept + single * kind.single[0]),
        kept_cast=elements * (double * cast + single * kind.single[1]),
        kept_checkpointed=elements * (double + single + 1.0),
        largest_block=elements * largest[0],
        largest_cast=elements * largest[1],
        forward=elements * kind.forward,
        forward_flops=flops,
        # the last block of Stable Diffusion 3 has one product less
        adapter_per_rank=(kind.adapter[0] * (double + refiners) + kind.adapter[1] * single - 2 * sd3) * channels,
        convolutions=0,
        guides_by_input=bool(net.get("guidance_embeds")),
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
    # a VAE of videos pads a picture to three frames; half of its products are of frames
    frames = vae.get("frames", 1)
    return {"pixels": area, "vae_channels": channels[min(1, len(channels) - 1)] * frames, "decode_flops": float(flops * (1 + frames) / 2)}
