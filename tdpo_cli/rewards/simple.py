"""Rewards without weights: a JPEG's size in both directions, as in DDPO, and the sandbox's true reward."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.custom import FunctionReward
from tdpo_cli.rewards.preprocess import quantise

JPEG_QUALITY = 95


class JpegSize:
    """Black et al. 2024 (DDPO), section 5.1: the size of the image as a JPEG of quality 95."""

    needs_prompt = False

    def __init__(self, name: str, sign: int):
        self.name = name
        self.sign = sign

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32: kilobytes (of 1000 bytes), negated where small files are wanted."""
        sizes = [len(encode_jpeg(image)) / 1000 for image in quantise(images).byte().permute(0, 2, 3, 1).cpu()]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device) * self.sign

    def describe(self) -> dict[str, Any]:
        return {
            "checkpoint": None,
            "sha256": {},
            "variant": "tdpo",
            "preprocessing": {"resize": None, "jpeg_quality": JPEG_QUALITY},
            "scale": "kilobytes" if self.sign > 0 else "kilobytes, negated",
        }


def encode_jpeg(pixels: Tensor) -> bytes:
    """[H,W,3] uint8 -> the file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def jpeg_compressibility(backbones: Backbones, checkpoint: str | None, variant: str) -> JpegSize:
    return JpegSize("jpeg-compressibility", -1)


def jpeg_incompressibility(backbones: Backbones, checkpoint: str | None, variant: str) -> JpegSize:
    return JpegSize("jpeg-incompressibility", 1)


def gold(backbones: Backbones, checkpoint: str | None, variant: str) -> FunctionReward:
    """How well a sandbox image shows what its prompt says, by analysis and synthesis; meaningless on other images."""
    from tdpo_cli.sandbox import world

    return FunctionReward("gold", world.gold, needs_prompt=True)
