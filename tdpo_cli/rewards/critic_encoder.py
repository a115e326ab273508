"""Which image encoder the critic reads, by training reward."""

from __future__ import annotations

from collections.abc import Mapping

from tdpo_cli.rewards import check_name
from tdpo_cli.rewards.backbones import Backbones, ImageEncoder


def critic_encoder(reward_name: str, backbones: Backbones, checkpoints: Mapping[str, str]) -> ImageEncoder:
    """The critic's image encoder for a reward: PickScore's and HPSv2's own ViT-H, CLIP ViT-L/14 for all others.

    `checkpoints` maps reward names to their paths; an aesthetic folder there lends its CLIP. The instance is the
    one the reward itself uses, wherever that is the same model.
    """
    check_name(reward_name)
    if reward_name == "pickscore":
        from tdpo_cli.rewards.pickscore import backbone
    elif reward_name in ("hpsv2", "hpsv2.1"):
        from tdpo_cli.rewards.hpsv2 import backbone
    else:
        from tdpo_cli.rewards.aesthetic import backbone

        reward_name = "aesthetic"
    return backbone(backbones, checkpoints.get(reward_name), reward_name)
