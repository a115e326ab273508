"""The base model of a preset, read from its parts' configs and weight files; by its name where it is not on this disk. Standard library only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tdpo_cli.config.settings import Preset
from tdpo_cli.machine.counting import Networks, counted, counted_transformer
from tdpo_cli.machine.published import SD1_PARAMETERS, SD1_UNET, SD1_VAE, SDXL_PARAMETERS, SDXL_UNET, SDXL_VAE, TRANSFORMERS
from tdpo_cli.sandbox import EMBEDDED, ZOO, is_embedded


def networks(preset: Preset) -> Networks:
    """The preset's base model, read from its parts' configs and weight files; by its name where it is not on this disk."""
    base = ZOO / EMBEDDED[preset.model.base] if is_embedded(preset.model.base) else Path(preset.model.base).expanduser()
    xl, here = is_sdxl(base), (base / "model_index.json").is_file()
    known = None if here else published(preset.model.base)
    if known is not None:
        denoiser, parameters, vae = known[0], dict(known[1]), known[2] if len(known) > 2 else SD1_VAE
    else:
        denoiser, vae, parameters = (SDXL_UNET, SDXL_VAE, dict(SDXL_PARAMETERS)) if xl else (SD1_UNET, SD1_VAE, dict(SD1_PARAMETERS))
    name = "transformer" if known is not None or (base / "transformer" / "config.json").is_file() else "unet"
    if (base / name / "config.json").is_file():
        own = _read(base / name / "config.json", private=True)
        denoiser = own if name == "transformer" else {**SD1_UNET, **own}
        vae = _vae(_read(base / "vae" / "config.json") if (base / "vae" / "config.json").is_file() else {})
        stored = {part.parent.name: stored_parameters(part.parent) for part in base.glob("*/config.json")}
        # of a part whose files are not safetensors the published size is left
        parameters = {part: stored.get(part) or parameters.get(part, 0.0) for part in {**parameters, **stored} if part in stored}
    if preset.model.drop_t5:
        parameters.pop("text_encoder_3", None)
    count, patch = counted_transformer if name == "transformer" else counted, 2 if name == "transformer" else 1
    if preset.model.resolution is not None:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        denoiser = {**denoiser, "sample_size": tuple(max(patch, side // factor) for side in preset.model.resolution)}
    upcast = xl and preset.model.vae is None and preset.model.dtype == "fp16" and bool(vae.get("force_upcast"))
    return count(denoiser, vae, parameters, upcast)


def published(base: str) -> tuple[dict[str, Any], ...] | None:
    """Config, weights and VAE of a flow model, by what its hub id contains; None where no table has it."""
    name = base.lower()
    found = next((word for word in TRANSFORMERS if word in name), None)
    return None if found is None or (found == "flux" and any(word in name for word in UNCOUNTED)) else TRANSFORMERS[found]


UNCOUNTED = ("qwen", "z-image", "flux.2", "flux2")  # what hub ids contain whose model is none of the published ones


def guessed(preset: Preset) -> bool:
    """Whether the prediction is of another model's size, since this one's is not known before it is downloaded."""
    base = preset.model.base
    here = is_embedded(base) or (Path(base).expanduser() / "model_index.json").is_file()
    return not here and published(base) is None and any(word in base.lower() for word in UNCOUNTED)


def _vae(config: dict[str, Any]) -> dict[str, Any]:
    """A VAE's config, that of a video VAE in the other ones' words."""
    if "base_dim" in config:
        return {"block_out_channels": [config["base_dim"] * factor for factor in config["dim_mult"]], "frames": 3}
    return {**SD1_VAE, **config}


def stored_parameters(folder: Path) -> int:
    """Weights in a part's safetensors files, by their headers: the plain files if there are any, else fp16's."""
    files = [file for file in folder.glob("*.safetensors") if "non_ema" not in file.name]
    plain = [file for file in files if ".fp16" not in file.name]
    return sum(_tensors(file) for file in plain or files)


def _tensors(file: Path) -> int:
    """Elements of a safetensors file; of a damaged one its size in half precision, since loading will name it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > 10**8:
            return file.stat().st_size // 2
        try:
            header = json.loads(opened.read(length))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return file.stat().st_size // 2


def is_sdxl(base: Path) -> bool:
    """By the folder's index, and by the name where there is no folder."""
    if (base / "model_index.json").is_file():
        return str(_read(base / "model_index.json", private=True).get("_class_name", "")).startswith("StableDiffusionXL")
    return "xl" in base.name.lower()


def _read(path: Path, private: bool = False) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if private or not key.startswith("_")}
