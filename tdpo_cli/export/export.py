"""A checkpoint in the format of another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tdpo_cli import __version__
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError
from tdpo_cli.export.request import FORMATS, ExportRequest
from tdpo_cli.models import kohya, lora_file
from tdpo_cli.storage import disk
from tdpo_cli.storage.run_dir import RunDir


def run(request: ExportRequest, console: Console) -> dict[str, Any]:
    """Write the checkpoint's LoRA as one file for ComfyUI, A1111 and their kin. -> a summary for --json. Raises RequestError, WorkError."""
    if request.format not in FORMATS:
        raise RequestError(f"--format {request.format}: unknown format. Known: {', '.join(FORMATS)}.")
    source = request.source()
    if source.preset.model.start_from is None:
        raise RequestError(f"{request.checkpoint}: no LoRA there to export, but a whole model.")
    folder = Path(source.preset.model.start_from)
    if source.preset.model.lora_rank == 0 and (folder / "unet").is_dir():
        raise RequestError(
            f"{folder}: a whole UNet was trained, and kohya's format holds LoRAs. diffusers reads {folder / 'unet'} as it is; for ComfyUI and "
            "A1111 save it inside its pipeline and convert that with diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py."
        )
    out = request.file(source)
    if out.suffix != ".safetensors":
        raise RequestError(f"--out {out}: expected a file that ends in .safetensors.")
    if out.exists():
        raise RequestError(f"{out} exists already; choose another --out.")

    state = lora_file.read(folder)
    try:
        converted, facts = kohya.convert(state), kohya.metadata(state, out.stem)
    except RequestError as error:
        raise RequestError(f"{lora_file.find(folder)}: {error}") from None
    metadata = facts | _training(folder)
    disk.make(out.parent)
    with disk.whole(out) as aside:
        save_file(converted, aside, metadata=metadata)
    rank = kohya.rank_of(state)
    console.say(f"{source.name}: {len(state) // 2} layers of rank {rank}, alpha {rank}, in {out}")
    return {"out": str(out), "format": request.format, "source": source.name, "layers": len(state) // 2, "rank": rank, "alpha": float(rank)}


def _training(folder: Path) -> dict[str, str]:
    """How a run's checkpoint came about, in kohya's words; nothing for a file that belongs to no run."""
    run = RunDir(folder.parent.parent)
    if not (folder / "manifest.json").is_file() or not run.holds_a_run:
        return {}
    preset, epoch = run.read_preset(), json.loads((folder / "manifest.json").read_text())["epoch"]
    base = preset.model.base
    return {
        "ss_sd_model_name": Path(base).name if Path(base).exists() else base,
        "ss_seed": str(preset.run.seed),
        "ss_epoch": str(epoch + 1),  # kohya counts epochs that are done
        "ss_learning_rate": str(preset.update.learning_rate),
        "ss_training_comment": f"tdpo {__version__}: {preset.algorithm.name} on the reward {preset.reward.train}, {folder.name}",
    }
