"""HPSv2 and HPSv2.1: how well an image fits its prompt, by an open_clip ViT-H/14 tuned on people's rankings.

Source: Wu et al. 2023; the `hpsv2` package's `img_score.py`. The package squeezes the whole image into the square and
fills up with black; TDPO crops as for the other rewards. On images that are not square the two differ strongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.rewards import files
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.networks import OpenClipBackbone, cosine
from tdpo_cli.rewards.preprocess import Square

HUB = "xswu/HPSv2"
WEIGHTS = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


class HPSv2:
    needs_prompt = True

    def __init__(self, name: str, clip: OpenClipBackbone, checkpoint: str, variant: str):
        self.name = name
        self.clip = clip
        self.checkpoint = checkpoint
        self.variant = variant
        self.framing = "floor" if variant == "tdpo" else "letterbox"

    @property
    def square(self) -> Square | None:
        """What `score` sees of an image; the square alone gets the same score. None with black bars."""
        return None if self.framing == "letterbox" else (self.clip.image_size, self.framing)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1], one prompt each -> [b] float32 cosines."""
        return cosine(self.clip, images, prompts, self.framing).to(images.device)

    def describe(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "sha256": files.fingerprints(*self.clip.paths),
            "variant": self.variant,
            "preprocessing": self.clip.preprocessing(self.framing),
            "scale": "cosine, about 0.27",
        }


def hpsv2(backbones: Backbones, checkpoint: str | None, variant: str) -> HPSv2:
    """`checkpoint`: the .pt file, or a folder or hub id with it (and an open_clip_config.json for another size)."""
    return HPSv2("hpsv2", backbone(backbones, checkpoint, "hpsv2"), checkpoint or HUB, variant)


def hpsv2_1(backbones: Backbones, checkpoint: str | None, variant: str) -> HPSv2:
    """The same network with the weights of version 2.1."""
    return HPSv2("hpsv2.1", backbone(backbones, checkpoint, "hpsv2.1"), checkpoint or HUB, variant)


def backbone(backbones: Backbones, checkpoint: str | None, name: str) -> OpenClipBackbone:
    """The open_clip network of one version, which is also its critic's eye."""
    source = checkpoint or HUB
    weights = Path(source).expanduser()
    if not weights.is_file():
        weights = files.find(source, WEIGHTS[name], needed_by=name, fetch=f"{HUB} {WEIGHTS[name]}")
    return backbones.open_clip(weights)
