"""PickScore: how well an image fits its prompt, by a CLIP ViT-H/14 tuned on people's choices.

Source: Kirstain et al. 2023 (Pick-a-Pic), and the README of its package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.rewards import files
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.networks import ClipBackbone, cosine
from tdpo_cli.rewards.preprocess import Square

HUB = "yuvalkirstain/PickScore_v1"
TOKENIZER_HUB = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # where PickScore's own example takes its processor from


class PickScore:
    name = "pickscore"
    needs_prompt = True

    def __init__(self, clip: ClipBackbone, variant: str):
        self.clip = clip
        self.variant = variant

    @property
    def square(self) -> Square:
        """What `score` sees of an image; the square alone gets the same score."""
        return self.clip.image_size, "floor"

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1], one prompt each -> [b] float32: cosines, in the package times exp(logit_scale)."""
        scores = cosine(self.clip, images, prompts)
        if self.variant == "package":
            scores = scores * self.clip.logit_scale
        return scores.to(images.device)

    def describe(self) -> dict[str, Any]:
        scales = {"tdpo": "cosine, about 0.2", "package": "exp(logit_scale) * cosine, about 20"}
        return {
            "checkpoint": self.clip.source,
            "sha256": files.fingerprints(*self.clip.paths),
            "variant": self.variant,
            "preprocessing": self.clip.preprocessing(),
            "scale": scales[self.variant],
        }


def pickscore(backbones: Backbones, checkpoint: str | None, variant: str) -> PickScore:
    """`checkpoint`: a folder or hub id with a CLIPModel and its tokenizer."""
    clip = backbone(backbones, checkpoint)
    clip.load_tokenizer()  # a missing tokenizer should show now, not after an epoch of sampling
    return PickScore(clip, variant)


def backbone(backbones: Backbones, checkpoint: str | None, name: str = "pickscore") -> ClipBackbone:
    """PickScore's own CLIP, which is also its critic's eye."""
    return backbones.clip(checkpoint or HUB, needed_by=name, hub_id=HUB, tokenizer_hub=TOKENIZER_HUB)
