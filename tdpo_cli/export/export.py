"""A checkpoint in the format of another program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tdpo_cli import __version__, models
from tdpo_cli.config.settings import Model
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError
from tdpo_cli.export.request import ExportRequest
from tdpo_cli.models import kohya, lora_file
from tdpo_cli.storage import disk
from tdpo_cli.storage.run_dir import Manifest, RunDir


def run(request: ExportRequest, console: Console) -> dict[str, Any]:
    """Write the checkpoint's LoRA as one file for ComfyUI, A1111 and their kin. -> a summary for --json. Raises RequestError, WorkError."""
    request.check()
    source = request.source()
    folder, out = Path(source.preset.model.start_from), request.file(source)
    state, alpha_of = lora_file.read(folder), lora_file.alpha_of(folder)
    try:
        ranks = kohya.ranks_of(state)
        layer = next(key for key, tensor in state.items() if ".lora_A." in key and len(tensor) == ranks[-1]).partition(".lora_A.")[0]
        alpha = alpha_of(layer, ranks[-1])
        converted = kohya.convert(state, _sdxl_layers(source.preset.model, state), alpha_of)
        facts = kohya.metadata(state, out.stem, alpha)
    except RequestError as error:
        raise RequestError(f"{lora_file.find(folder)}: {error}") from None
    metadata = facts | _training(folder)
    disk.make(out.parent)
    with disk.whole(out) as aside:
        save_file(converted, aside, metadata=metadata)
    said = " and ".join(map(str, ranks)) if len(ranks) < 3 else f"{ranks[0]} to {ranks[-1]}"
    console.say(f"{source.name}: {len(state) // 2} layers of rank {said}, alpha {alpha:g}, in {out}")
    return {"out": str(out), "format": request.format, "source": source.name, "layers": len(state) // 2, "rank": ranks[-1], "alpha": alpha}


def _sdxl_layers(model: Model, state: Mapping[str, Tensor]) -> int | None:
    """The layers per block of an SDXL base, None for Stable Diffusion 1 and 2: by the base where it is here, else by the weights' width."""
    base = Path(models.resolve(model.base))
    if (base / "model_index.json").is_file():
        if "XL" not in models.pipeline_class(str(base), models.index(str(base))):
            return None
        return json.loads((base / "unet" / "config.json").read_text())["layers_per_block"]
    return 2 if kohya.GENERATIONS.get(kohya.text_width(state)) == "sdxl_base_v1-0" else None


def _training(folder: Path) -> dict[str, str]:
    """How a run's checkpoint came about, in kohya's words; nothing for a file that belongs to no run."""
    run = RunDir(folder.parent.parent)
    if not (folder / "manifest.json").is_file() or not run.holds_a_run:
        return {}
    preset, epoch = run.read_preset(), Manifest.read(folder).epoch
    base = preset.model.base
    return {
        "ss_sd_model_name": Path(base).name if Path(base).exists() else base,
        "ss_seed": str(preset.run.seed),
        "ss_epoch": str(epoch + 1),  # kohya counts epochs that are done
        "ss_learning_rate": str(preset.update.learning_rate),
        "ss_training_comment": f"tdpo {__version__}: {preset.algorithm.name} on the reward {preset.trained_words}, {folder.name}",
    }
