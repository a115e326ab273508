"""Model families: what a policy must offer, and which file offers it."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tdpo_cli.config.preset import Model
from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.sandbox import ZOO
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.types import Conditioning, Transition


class Policy(Protocol):
    """A text-to-image model as a policy: each denoising step k is an action with a Gaussian density.

    Rollout and update call the same `transition`. `reference` means the weights before any training.
    """

    device: torch.device
    latent_shape: tuple[int, int, int]  # (C, h, w)
    timesteps: Tensor  # [T] int64, descending; set by `set_schedule`
    trainable: dict[str, torch.nn.Parameter]  # what the optimizer moves, by name

    def set_schedule(self, steps: int, eta: float) -> None: ...
    def cut_up(self, checkpointing: bool, compile: bool) -> None: ...  # memory against time; the result stays the same
    def normal_form(self, prompt: str) -> str: ...
    def encode(self, prompts: Sequence[str]) -> Conditioning: ...  # a row per prompt, the negative prompt last
    def predict(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Tensor: ...
    def transition(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Transition: ...
    def decode(self, latents: Tensor) -> Tensor: ...  # -> [b,3,H,W] float32 in [0,1]
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
    def save(self, folder: Path) -> None: ...


# diffusers' pipeline class -> the module whose `load(source, model, ...)` makes a Policy of it
FAMILIES = {"StableDiffusionPipeline": "tdpo_cli.models.families.sd"}


def resolve(base: str) -> str:
    """The word `sandbox` as the embedded model's folder; everything else as it is."""
    return str(ZOO / "pipeline") if base == "sandbox" else base


def load(model: Model, *, device: torch.device | str = "cpu", trainable: bool = True, **options: Any) -> Policy:
    """The policy of `model.base`. `trainable=False` leaves out the adapter. Raises RequestError for a folder that is no model."""
    if model.base == "sandbox" and ("OMP_NUM_THREADS" not in os.environ or "TDPO_THREADS_SHARED" in os.environ):
        torch.set_num_threads(1)  # its networks are so small that a second thread costs more than it brings
    source, model = resolve(model.base), _starting_point(model)
    family = _family(source, model.revision)
    return importlib.import_module(FAMILIES[family]).load(source, model, device=torch.device(device), trainable=trainable, **options)


def _starting_point(model: Model) -> Model:
    """A run folder as its last checkpoint. Raises RequestError for what is not there."""
    if model.start_from is None:
        return model
    path = Path(model.start_from)
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder to start from. Give a LoRA file or folder, a checkpoint or a run.")
    return replace(model, start_from=str(RunDir(path).checkpoint() if RunDir(path).holds_a_run else path))


def _family(source: str, revision: str | None) -> str:
    file = _index_file(source, revision)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        family = index.get("_class_name", "?")
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(f"{file}: damaged: {error}. Copy or download the model again.") from None
    # Safe, img2img and other pipelines around the same networks; their UNet says whether it fits
    if family.startswith("StableDiffusion") and "XL" not in family and not family.startswith("StableDiffusion3"):
        return "StableDiffusionPipeline"
    raise RequestError(f"{source}: a {family} is not supported. Supported: Stable Diffusion 1.x and 2.x (StableDiffusionPipeline).")


def _index_file(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise RequestError(
                f"{folder}: no model_index.json there, so it is no diffusers model folder. Give the folder that holds it (beside unet/, vae/, ...)."
            )
        return folder / "model_index.json"
    if folder.is_file():
        raise RequestError(
            f"{folder}: a single file, expected a diffusers folder. Convert it once, in Python: "
            f"diffusers.StableDiffusionPipeline.from_single_file({str(folder)!r}).save_pretrained(FOLDER)"
        )
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise RequestError(f"{source}: no such model folder, and not a hub id (owner/name) either.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "model_index.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason, at = first_line(error), f" --revision {revision}" if revision else ""
        raise RequestError(
            f"{source}: no such folder, and the hub did not give it: {reason}\nFetch it with: hf download {source}{at}\n"
            "or give a folder: --set model.base=PATH"
        ) from None
