"""The hub's model card, written beside every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tdpo_cli import __version__
from tdpo_cli.preset import Preset
from tdpo_cli.run_dir import epoch_name


def model_card(preset: Preset, epoch: int, row: dict[str, Any]) -> str:
    """The hub's model card of one checkpoint."""
    number = lambda name, what: "-" if (value := row[f"rewards/{name}/{what}"]) is None else f"{value:.4f}"  # noqa: E731
    scores = "\n".join(f"| {name} | {number(name, 'mean')} | {number(name, 'std')} |" for name in preset.rewards)
    lora = preset.model.lora_rank > 0
    base = f"base_model: {preset.model.base}\n" if "/" in preset.model.base and not Path(preset.model.base).exists() else ""
    load = f'pipe.load_lora_weights("{epoch_name(epoch)}")' if lora else "unet = UNet2DConditionModel.from_pretrained(folder, subfolder='unet')"
    return f"""---
library_name: diffusers
tags: [text-to-image, diffusers{", lora" if lora else ""}, reinforcement-learning, {preset.algorithm.name}]
{base}---

# {preset.algorithm.name.upper()} on {preset.reward.train}, epoch {epoch}

Trained with tdpo {__version__} from `{preset.model.base}` on the reward `{preset.reward.train}`, {row["reward_queries"]} reward queries,
{row["updates"]} optimizer steps, seed {preset.run.seed}. A reward model's score that rises is not proof of better images:
compare the watched rewards.

| reward (on the epoch's own training samples) | mean | std |
|---|---|---|
{scores}

    {load}

Guidance scale {preset.rollout.guidance_scale:g}, {preset.rollout.steps} DDIM steps. The weights here: {'pytorch_lora_weights.safetensors' if lora else 'unet/'}.
"""
