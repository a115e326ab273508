"""The LAION aesthetic predictor: a small head on CLIP ViT-L/14, about 1 to 10, blind to the prompt.

Source: christophschuhmann/improved-aesthetic-predictor (`simple_inference.py`); as in DDPO and TDPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tdpo_cli.rewards import files
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.networks import CLIP_HUB, ClipBackbone, ScoreHead
from tdpo_cli.rewards.preprocess import Square

HEAD_HUB, HEAD_HUB_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"  # the same weights, as LAION published them


class Aesthetic:
    name = "aesthetic"
    needs_prompt = False

    def __init__(self, clip: ClipBackbone, head: ScoreHead, variant: str):
        self.clip = clip
        self.head = head
        self.variant = variant
        self.crop_offset = "floor" if variant == "tdpo" else "round"  # transformers' and torchvision's central crop

    @property
    def square(self) -> Square:
        """What `score` sees of an image; the square alone gets the same score."""
        return self.clip.image_size, self.crop_offset

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32."""
        embeddings = normalize(self.clip.image_features(images, self.crop_offset), dim=-1)
        return self.head(embeddings).to(images.device)

    def describe(self) -> dict[str, Any]:
        return {
            "checkpoint": self.clip.source,
            "sha256": files.fingerprints(*self.clip.paths, *self.head.paths),
            "variant": self.variant,
            "preprocessing": self.clip.preprocessing(self.crop_offset),
            "scale": "the head's output on the L2-normalised CLIP embedding, about 1 to 10",
        }


def aesthetic(backbones: Backbones, checkpoint: str | None, variant: str) -> Aesthetic:
    """`checkpoint`: a folder with a CLIPModel and the head, or the head's .pth alone, or a hub id of the CLIPModel."""
    clip = backbone(backbones, checkpoint)
    path = _head_path(checkpoint)
    key = ("aesthetic head", path.resolve())
    head = backbones.hold(key, lambda: ScoreHead(files.read_weights(path), path, clip.embed_dim))
    return Aesthetic(clip, head, variant)


def backbone(backbones: Backbones, checkpoint: str | None, name: str = "aesthetic") -> ClipBackbone:
    """The CLIP ViT-L/14 that belongs to `checkpoint`; also the critic's eye for most rewards."""
    head_alone = checkpoint is None or Path(checkpoint).expanduser().is_file()
    return backbones.clip(CLIP_HUB if head_alone else checkpoint, needed_by=name)


def _head_path(checkpoint: str | None) -> Path:
    if checkpoint is not None and files.is_local(checkpoint):
        path = Path(checkpoint).expanduser()
        if path.is_file():
            return path
        return files.find(path, HEAD_FILE, HEAD_HUB_FILE, needed_by="aesthetic", fetch=f"{HEAD_HUB} {HEAD_HUB_FILE}")
    return files.find(HEAD_HUB, HEAD_HUB_FILE, needed_by="aesthetic")
