"""Algorithms: what an epoch's rewards are worth to each step. Here the table of them; imports no torch.

A new algorithm is one file beside this one and one line in `ALGORITHMS`; everything else reads `preset.algorithm.facts`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdpo_cli.algorithms.base import Algorithm
    from tdpo_cli.config.settings import Preset

BLACK = "[Black et al. 2023](https://arxiv.org/abs/2305.13301)"
LIU = "[Liu et al. 2025](https://arxiv.org/abs/2505.05470)"
ZHANG = "[Zhang et al. 2024](https://arxiv.org/abs/2402.08552)"


@dataclass(frozen=True)
class Facts:
    """What the rest of the program must know of an algorithm without importing it."""

    place: str  # module:class, made from the preset
    paper: str  # a Markdown link
    critic: bool = False  # a critic sees the states and is trained
    resets: bool = False  # neurons of the critic are re-initialised
    groups: bool = False  # images of one prompt are judged against each other, without other statistics of the rewards
    all_timesteps: bool = False  # gradients may be accumulated over all timesteps


ALGORITHMS = {
    "ddpo": Facts("tdpo_cli.algorithms.ddpo:DDPO", BLACK, all_timesteps=True),
    "grpo": Facts("tdpo_cli.algorithms.grpo:GRPO", LIU, groups=True, all_timesteps=True),
    "tdpo": Facts("tdpo_cli.algorithms.tdpo:TDPO", ZHANG, critic=True),
    "tdpo-r": Facts("tdpo_cli.algorithms.tdpo:TDPOR", ZHANG, critic=True, resets=True),
}

_CRITIC = (
    "algorithm.advantage_norm algorithm.critic_coef algorithm.critic_dropout algorithm.critic_activation algorithm.critic_steps "
    "algorithm.critic_init_std algorithm.dormant_threshold algorithm.extra_dormant_threshold algorithm.neuron_rows "
    "update.critic_learning_rate update.clip_range_critic"
).split()
_STATISTICS = (
    "reward.normalise reward.scale_only reward.buffer_size reward.min_count reward.clip_range algorithm.gamma "
    "algorithm.kl_penalty algorithm.kl_penalty_coef algorithm.init_kl_coef algorithm.kl_target algorithm.kl_horizon"
).split()
_GROUPS = "rollout.images_per_prompt algorithm.advantage_std algorithm.advantage_clip algorithm.guard".split()
# setting -> the algorithms that it acts on; a setting that is not here acts on all
ACTS_ON: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, facts in ALGORITHMS.items() if acts(facts))
    for keys, acts in (
        (_CRITIC, lambda facts: facts.critic),
        (("algorithm.reset_every", "algorithm.reset_target"), lambda facts: facts.resets),
        (_STATISTICS, lambda facts: not facts.groups),
        (_GROUPS, lambda facts: facts.groups),
        (("algorithm.update_mode",), lambda facts: facts.all_timesteps),
    )
    for key in keys
}


def make(preset: Preset) -> Algorithm:
    """The algorithm that the preset names."""
    module, _, name = preset.algorithm.facts.place.partition(":")
    return getattr(importlib.import_module(module), name)(preset)
