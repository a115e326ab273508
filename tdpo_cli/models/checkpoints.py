"""What a CHECKPOINT argument names: a checkpoint folder, a run, LoRA weights, `base`, a diffusers folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.models import lora_file
from tdpo_cli.models.lora_file import FILE as LORA_FILE
from tdpo_cli.storage.run_dir import RunDir, check_weights


@dataclass(frozen=True)
class Checkpoint:
    """A base model and the weights on top of it."""

    base: str  # a diffusers folder, a hub id or an embedded model, such as `sandbox`
    revision: str | None  # of a hub id
    dtype: str
    weights: str | None  # a LoRA file, or a folder with a LoRA or a whole network; None is the base model itself
    vae: str | None = None  # another one than the base model's
    resolution: tuple[int, int] | None = None  # (height, width) in pixels; None: the base model's own

    @property
    def section(self) -> Model:
        """The `model` section that `models.load` reads."""
        return Model(base=self.base, revision=self.revision, start_from=self.weights, dtype=self.dtype, vae=self.vae, resolution=self.resolution)


@dataclass(frozen=True)
class Source:
    """A model to sample from: the preset says how, its `model` section says of what."""

    preset: Preset  # model.base and model.start_from name the weights
    name: str  # for folder names and titles

    @property
    def checkpoint(self) -> Checkpoint:
        """What to load; the path of the weights is absolute."""
        model = self.preset.model
        weights = None if model.start_from is None else str(Path(model.start_from).resolve())
        return Checkpoint(model.base, model.revision, model.dtype, weights, model.vae, model.resolution)


def find(argument: str, preset: str | None, overrides: Sequence[tuple[str, Any]], epoch: int | None = None) -> Source:
    """Where the argument's weights lie and with which settings to sample them. Raises RequestError."""
    path = Path(argument)
    if epoch is not None and not RunDir(path).holds_a_run:
        raise RequestError(f"--epoch chooses a checkpoint of a run folder, and {argument} is none.")
    if argument == "base":
        return Source(_settings(preset, overrides), "base")
    if RunDir(path).holds_a_run:
        return _of_run(RunDir(path), RunDir(path).checkpoint(epoch), preset, overrides)
    if (path / "manifest.json").is_file() and RunDir(path.parent.parent).holds_a_run:
        return _of_run(RunDir(path.parent.parent), path, preset, overrides)
    if (path / "model_index.json").is_file():
        return Source(_with_base(_settings(preset, overrides), argument), path.resolve().name)
    if path.exists():
        return _weights(path, _settings(preset, overrides), path.stem)
    if argument.count("/") == 1 and not argument.startswith((".", "/", "~")):
        return Source(_with_base(_settings(preset, overrides), argument), argument.replace("/", "--"))
    raise RequestError(f"{argument}: no such checkpoint, run or model folder (and not a hub id, owner/name).")


def _of_run(run: RunDir, folder: Path, preset: str | None, overrides: Sequence[tuple[str, Any]]) -> Source:
    settings = presets.load(preset, overrides) if preset else presets.override(run.read_preset(), overrides)
    return _weights(folder, settings, f"{run.path.resolve().name}-{folder.name}")


def _weights(path: Path, settings: Preset, name: str) -> Source:
    """LoRA weights on the base model, or a whole network in place of the base model's; as its manifest says, where there is one."""
    check_weights(path)
    if path.is_file() or (path / LORA_FILE).is_file() or any(path.glob("*.safetensors")):
        return Source(replace(settings, model=replace(settings.model, start_from=str(path))), name)
    if (part := lora_file.whole_network(path)) is not None and (path / part / "config.json").is_file():
        return Source(replace(settings, model=replace(settings.model, start_from=str(path), lora_rank=0)), name)
    raise RequestError(f"{path}: neither LoRA weights ({LORA_FILE}) nor a whole network (unet/, transformer/) nor a run nor a diffusers model there.")


def _settings(preset: str | None, overrides: Sequence[tuple[str, Any]]) -> Preset:
    return presets.load("quickstart" if preset is None else preset, overrides)


def _with_base(settings: Preset, base: str) -> Preset:
    return replace(settings, model=replace(settings.model, base=base, start_from=None))
