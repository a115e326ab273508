"""Algorithms: what an epoch's rewards are worth to each step. Here the table of them; imports no torch.

A new algorithm is one file beside this one and one line in `ALGORITHMS`; everything else reads `preset.algorithm.facts`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdpo_cli.algorithms.base import Algorithm
    from tdpo_cli.config.preset import Preset

BLACK = "[Black et al. 2023](https://arxiv.org/abs/2305.13301)"
ZHANG = "[Zhang et al. 2024](https://arxiv.org/abs/2402.08552)"


@dataclass(frozen=True)
class Facts:
    """What the rest of the program must know of an algorithm without importing it."""

    place: str  # module:class, made from the preset
    paper: str  # a Markdown link
    critic: bool = False  # a critic sees the states and is trained
    resets: bool = False  # neurons of the critic are re-initialised
    all_timesteps: bool = False  # gradients may be accumulated over all timesteps


ALGORITHMS = {
    "ddpo": Facts("tdpo_cli.algorithms.ddpo:DDPO", BLACK, all_timesteps=True),
    "tdpo": Facts("tdpo_cli.algorithms.tdpo:TDPO", ZHANG, critic=True),
    "tdpo-r": Facts("tdpo_cli.algorithms.tdpo:TDPOR", ZHANG, critic=True, resets=True),
}


def make(preset: Preset) -> Algorithm:
    """The algorithm that the preset names."""
    module, _, name = preset.algorithm.facts.place.partition(":")
    return getattr(importlib.import_module(module), name)(preset)
