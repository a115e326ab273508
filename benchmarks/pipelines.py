"""Pipelines and a reward with random weights, in the published architectures or tiny ones, as folders that the product reads."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tdpo_cli.rewards.aesthetic import HEAD_FILE
from tdpo_cli.rewards.preprocess import OPENAI_MEAN, OPENAI_STD

sys.path.append(str(Path(__file__).parent.parent / "tests" / "families"))
import make_tiny  # noqa: E402

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
VIT_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
}  # fmt: skip
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MIDDLE_CLIP = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
CLIPS = {  # vision, text
    "full": (VIT_L, CLIP_L), "middle": ({**MIDDLE_CLIP, "image_size": 112, "patch_size": 14}, {**TINY_CLIP, "projection_dim": 256}),
    "tiny": ({**TINY_CLIP, "image_size": 32, "patch_size": 8}, {**TINY_CLIP, "projection_dim": 32}),
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is run of a family at full size. `parts` are changes to the configs of the tiny pipeline."""

    tiny: str
    variant: int  # of the tiny pipeline
    preset: str
    pixels: int
    parts: dict[str, dict[str, Any]]


FAMILIES = {
    "sd1": Family("sd1", 1, "aesthetic", 512, {
        "unet": {
            "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
            "attention_head_dim": 8, "norm_num_groups": 32, "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
        "vae": {**VAE, "sample_size": 512}, "text_encoder": CLIP_L,
    }),
    "sdxl": Family("sdxl", 1, "sdxl-pickscore", 1024, {
        "unet": {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048, "norm_num_groups": 32,
            "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816, "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        },
        "vae": {**VAE, "sample_size": 1024}, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G,
    }),
    # Medium. Without T5, which the pipeline allows: its 4.8 billion weights only read the prompts
    "sd35": Family("sd3", 2, "sd35-pickscore", 512, {
        "transformer": {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        "vae": {**VAE, "sample_size": 1024, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": CLIP_L, "text_encoder_2": CLIP_G,
    }),
}  # fmt: skip


def network(folder: Path, changes: dict[str, Any], device: str) -> nn.Module:
    """The network of a folder's config.json with these changes, as its class initialises it: at random. `meta`: without numbers."""
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    with torch.device(device):
        if "_class_name" in config:  # diffusers'
            return getattr(diffusers, config["_class_name"]).from_config({**config, **changes})
        changes = {"vocab_size": 49408, **changes}
        own = transformers.CLIPTextConfig(**{**config, **changes})
        return getattr(transformers, config["architectures"][0])(own)


def pipeline(family: str, folder: Path, full: bool, device: str = "cpu") -> Path:
    """Write a pipeline with random weights; at full size in half precision."""
    known = FAMILIES[family]
    make_tiny.build(known.tiny, folder, known.variant)
    for part, changes in (known.parts if full else {}).items():
        made = network(folder / part, changes, device).half()
        made.save_pretrained(folder / part)
        del made
    return folder


def reward(folder: Path, size: str = "tiny", device: str = "cpu") -> Path:
    """Write an aesthetic reward with random weights, a CLIP and the head: `full` is ViT-L/14."""
    vision, text = CLIPS[size]
    width = text["projection_dim"]
    torch.manual_seed(1)
    with torch.device(device):
        texts = {key: value for key, value in text.items() if key != "projection_dim"}
        clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=texts, vision_config=vision, projection_dim=width))
        head = {}
        for index, (wide, narrow) in zip((0, 2, 4, 6, 7), ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
            layer = nn.Linear(wide, narrow)
            head |= {f"layers.{index}.weight": layer.weight.detach().cpu(), f"layers.{index}.bias": layer.bias.detach().cpu()}
    clip.save_pretrained(folder)
    torch.save(head, folder / HEAD_FILE)
    side = vision["image_size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder


def widened(family: str, folder: Path, times: int, pixels: int) -> Path:
    """A tiny pipeline of the family whose denoiser has so many times the heads, and with these the width; its VAE is so many times as wide."""
    make_tiny.build(family, folder, 1, size=pixels)
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    scaled = lambda value: [scaled(one) for one in value] if isinstance(value, list) else value * times
    # of a UNet `attention_head_dim` is the number of heads
    heads = ("attention_head_dim",) if part == "unet" else ("dim", "n_heads", "n_kv_heads", "num_attention_heads", "caption_projection_dim")
    for name, widths in ((part, (*heads, "block_out_channels")), ("vae", ("block_out_channels", "base_dim"))):
        config = json.loads((folder / name / "config.json").read_text())
        config |= {width: scaled(config[width]) for width in widths if config.get(width) is not None}
        made = getattr(diffusers, config["_class_name"]).from_config(config)
        make_tiny.redraw(made, torch.Generator().manual_seed(0))
        made.save_pretrained(folder / name)
    return folder
