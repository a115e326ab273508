"""What `tdpo cross-eval` is asked to do. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo_cli import rewards
from tdpo_cli.config import preset as presets_
from tdpo_cli.config import prompts
from tdpo_cli.cross_eval import candidates
from tdpo_cli.cross_eval.folder import Folder


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
    trust_rewards: bool = False  # run Python that a run's own preset names

    def check(self) -> None:
        """What can be said without torch and without reading weights. Raises RequestError."""
        Folder(self.out).read_request()
        presets = [one.source.preset for one in candidates.named(self.models, self.preset, self.overrides, self.epochs)]
        prompts.check(candidates.shared_prompt_source(self.prompts, presets))
        chosen = candidates.shared_rewards(self.rewards, presets)
        if not self.trust_rewards:
            given = presets_.custom_rewards(self.preset, self.overrides)
            rewards.check_trusted(chosen, (*(word.strip() for word in self.rewards.split(",")), *given), "a run's preset.json")
