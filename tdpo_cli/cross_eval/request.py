"""What `tdpo cross-eval` is asked to do. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CrossEvalRequest:
    """Models compared with their base on the same prompts and noise."""

    models: Sequence[str]  # run folders (all their checkpoints), checkpoints, LoRA files, models, `base`, as given
    out: Path  # one that was interrupted is continued
    rewards: str = "all"  # `all`: the runs' own, and the learned ones whose checkpoints they know; or names with commas between them
    prompts: str | None = None  # a prompt source; None: the runs' rollout.eval_prompts
    per_prompt: int = 2  # images
    seed: int = 0  # of the noise and of the bootstrap
    preset: str | None = None  # base model and sampling settings; None: the runs' own
    overrides: Sequence[tuple[str, Any]] = ()  # ("section.key", value), on top of the preset
    epochs: Sequence[int] = ()  # of run folders: only these checkpoints; empty: all
    batch_size: int | None = None  # images per network call; None: from memory
    device: str | None = None  # None: a GPU where there is one
