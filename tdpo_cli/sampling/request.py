"""What `tdpo sample` is asked to do. Without torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdpo_cli.errors import RequestError
from tdpo_cli.models import checkpoints
from tdpo_cli.models.checkpoints import Source
from tdpo_cli.storage import claims


@dataclass(frozen=True)
class SampleRequest:
    """Images of prompts from one model."""

    checkpoint: str  # a checkpoint, a run, LoRA weights, a model or `base`, as given
    prompts: Sequence[str]  # the texts
    preset: str | None = None  # base model and sampling settings; None: the run's own, else quickstart's
    overrides: Sequence[tuple[str, Any]] = ()  # ("section.key", value), on top of the preset
    epoch: int | None = None  # of a run folder; None: the last
    out: Path | None = None  # folder for the images; None: a new samples/NAME-0001, see in_a_folder
    per_prompt: int = 1  # images
    seed: int = 0  # of the noise
    batch_size: int | None = None  # images per network call; None: from memory
    lora_scale: float = 1.0  # strength of the LoRA; 0 is the base model
    device: str | None = None  # None: a GPU where there is one

    @property
    def images(self) -> int:
        return len(self.prompts) * self.per_prompt

    def check(self) -> None:
        """What can be said without torch. Raises RequestError."""
        if not math.isfinite(self.lora_scale):
            raise RequestError(f"--lora-scale {self.lora_scale}: expected a finite number.")
        self.source()
        if self.out is not None and (self.out / "metadata.jsonl").exists():
            raise RequestError(f"{self.out} already holds samples; choose another --out.")

    def source(self) -> Source:
        """The weights and the settings to sample them with. Raises RequestError."""
        return checkpoints.find(self.checkpoint, self.preset, self.overrides, self.epoch)

    @contextlib.contextmanager
    def in_a_folder(self) -> Iterator[SampleRequest]:
        """The same with `out`: a new folder of its own where none is given, which goes again if an error leaves it empty. Raises RequestError."""
        with claims.given_or_new(self.out, Path("samples"), self.source().name) as folder:
            yield replace(self, out=folder)
