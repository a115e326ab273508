"""What `tdpo export` is asked to do. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.models import checkpoints
from tdpo_cli.models.checkpoints import Source

FORMATS = ("kohya",)


@dataclass(frozen=True)
class ExportRequest:
    """A checkpoint's LoRA as one file."""

    checkpoint: str  # a checkpoint, a run or LoRA weights, as given
    format: str  # one of FORMATS
    out: Path | None = None  # None: NAME-kohya.safetensors, here
    epoch: int | None = None  # of a run folder; None: the last

    def source(self) -> Source:
        """Where the weights are. Raises RequestError."""
        return checkpoints.find(self.checkpoint, None, [], self.epoch)

    def file(self, source: Source) -> Path:
        """The file to write."""
        return self.out or Path(f"{source.name}-{self.format}.safetensors")
