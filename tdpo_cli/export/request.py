"""What `tdpo export` is asked to do. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.errors import RequestError
from tdpo_cli.models import checkpoints, lora_file
from tdpo_cli.models.checkpoints import Source

FORMATS = ("kohya",)


@dataclass(frozen=True)
class ExportRequest:
    """A checkpoint's LoRA as one file."""

    checkpoint: str  # a checkpoint, a run or LoRA weights, as given
    format: str  # one of FORMATS
    out: Path | None = None  # None: NAME-kohya.safetensors, here
    epoch: int | None = None  # of a run folder; None: the last

    def check(self) -> None:
        """What can be said without reading the weights. Raises RequestError."""
        if self.format not in FORMATS:
            raise RequestError(f"--format {self.format}: unknown format. Known: {', '.join(FORMATS)}.")
        source = self.source()
        if source.preset.model.start_from is None:
            raise RequestError(f"{self.checkpoint}: no LoRA there to export, but a whole model.")
        folder = Path(source.preset.model.start_from)
        if source.preset.model.lora_rank == 0 and (part := lora_file.whole_network(folder)) is not None:
            raise RequestError(
                f"{folder}: a whole network was trained, and kohya's format holds LoRAs. diffusers reads {folder / part} as it is; for ComfyUI and "
                "A1111 save it inside its pipeline and convert that with diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py."
            )
        out = self.file(source)
        if out.suffix != ".safetensors":
            raise RequestError(f"--out {out}: expected a file that ends in .safetensors.")
        if out.exists():
            raise RequestError(f"{out} exists already; choose another --out.")

    def source(self) -> Source:
        """Where the weights are. Raises RequestError."""
        return checkpoints.find(self.checkpoint, None, [], self.epoch)

    def file(self, source: Source) -> Path:
        """The file to write."""
        return self.out or Path(f"{source.name}-{self.format}.safetensors")
