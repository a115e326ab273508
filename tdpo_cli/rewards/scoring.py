"""Load the rewards a job needs, on shared backbones, and score batches of images with all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tdpo_cli import rewards
from tdpo_cli.errors import RequestError
from tdpo_cli.rewards.backbones import Backbones


def load_rewards(names: Sequence[str], backbones: Backbones, paths: Mapping[str, str], variant: str = "tdpo") -> dict[str, rewards.Reward]:
    """Rewards by name, in order. Raises RequestError."""
    return {name: rewards.load(name, backbones, checkpoint=paths.get(name), variant=variant) for name in names}


def score_images(
    scorers: Mapping[str, rewards.Reward],
    images: Tensor,
    prompts: Sequence[str],
    batch_size: int,
    on_scored: Callable[[int], None] = lambda scores: None,
) -> dict[str, Tensor]:
    """images [B,3,H,W] in [0,1], one prompt each -> name -> [B] float32 on the CPU. `on_scored` is called with the number of finished scores."""
    scores: dict[str, Tensor] = {}
    for name, reward in scorers.items():
        parts = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            with torch.no_grad():
                parts.append(reward.score(images[batch], prompts[batch]).float().cpu())
            on_scored(len(parts[-1]))
        scores[name] = torch.cat(parts)
        if scores[name].shape != (len(images),):
            raise RequestError(f"reward {name} gave {tuple(scores[name].shape)} scores for {len(images)} images.")
    return scores


def half_precision_difference(
    name: str,
    dtype: torch.dtype,
    images: Tensor,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | None = None,
    variant: str = "tdpo",
) -> dict[str, float]:
    """What computing a reward in `dtype` costs on these images: the largest and the mean |score - float32 score|."""
    scores = []
    for precision in (torch.float32, dtype):
        reward = rewards.load(name, Backbones(device, precision), checkpoint=checkpoint, variant=variant)
        scores.append(reward.score(images, prompts).double().cpu())
    difference = (scores[1] - scores[0]).abs()
    return {"max": difference.max().item(), "mean": difference.mean().item()}
