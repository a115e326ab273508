"""From a preset's [model] section to a policy: read a diffusers folder or hub id part by part, name what is missing or does not fit."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models import adapter, config_values, lora_file, quantise
from tdpo_cli.models.embeddings import Embeddings
from tdpo_cli.models.family import Family
from tdpo_cli.models.policy import Policy
from tdpo_cli.models.settings import check_model
from tdpo_cli.randomness import Randomness
from tdpo_cli.sandbox import is_embedded
from tdpo_cli.storage.run_dir import RunDir, check_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# the files of a network's weights, without variant and suffix: diffusers', and transformers' (safetensors, pickle)
DIFFUSERS_STEMS, TRANSFORMERS_STEMS = ("diffusion_pytorch_model",), ("model", "pytorch_model")
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


@dataclass(frozen=True)
class Placing:
    """Where a training run keeps the frozen weights.

    `distribute(network)` may shard the denoising network over processes; where it returns False the network moves to the device whole.
    `embeddings` keeps those of the run's prompts, where the family's text encoders are large; they leave the device before the denoiser comes.
    """

    distribute: Callable[[nn.Module], bool] | None = None
    embeddings: Embeddings | None = None


# --- a policy -----------------------------------------------------------------------------------------------------------
def load(
    model: Model,
    *,
    device: torch.device | str = "cpu",
    trainable: bool = True,
    negative_prompt: str = "",
    keep_reference: bool = False,
    randomness: Randomness | None = None,
    lora_scale: float = 1.0,
    placing: Placing | None = None,
) -> Policy:
    """Load the policy of `model.base`, with its adapter; `trainable=False` leaves out one that would be new. Raises RequestError."""
    placing = placing or Placing()
    if is_embedded(model.base) and ("OMP_NUM_THREADS" not in os.environ or "TDPO_THREADS_SHARED" in os.environ):
        torch.set_num_threads(1)  # these networks are so small that a second thread costs more than it brings
    source, model, device = models.resolve(model.base), _starting_point(model), torch.device(device)
    content = models.index(source, model.revision)
    entry = models.FAMILIES[models.pipeline_class(source, content)]
    check_model(model, entry)
    quantise.check(model.quantise, device.type)
    models.check_installed(source, entry)
    if trainable:
        models.check_trainable(source, content, model.allow_distilled)
    module, _, name = entry.place.partition(":")
    dtype = DTYPES[model.dtype] if device.type != "cpu" else torch.float32
    family: Family = getattr(importlib.import_module(module), name).load(source, model, dtype, device)
    config_values.bound_tokenizers(family.pipeline.components, source)
    if model.vae_tiling:
        family.pipeline.vae.enable_tiling()
    # a LoRA on the text encoders is not part of their files
    embeddings = placing.embeddings if family.unread and not text_lora(model) else None
    if embeddings is None:
        family.read_text_encoders()
    _settle(family, device, waits=trainable)
    if embeddings is not None:
        embeddings.fill(family, source, model, negative_prompt)
    if trainable:
        part = _trained_part(family, model, dtype, keep_reference, randomness or Randomness(0))
        if placing.distribute is None or not placing.distribute(family.network):
            family.network.to(device)
            if isinstance(part, adapter.WholeNetwork) and part.reference is not None:
                part.reference.to(device)
    else:
        part = adapter.Frozen()
        if model.start_from and not holds_network(model, family.component):
            adapter.load(family, Path(model.start_from))
            if lora_scale != 1.0:
                adapter.set_scale(family, lora_scale)
    return Policy(family, part, negative_prompt, embeddings)


def _starting_point(model: Model) -> Model:
    """A run folder as its last checkpoint. Raises RequestError for what is not there."""
    if model.start_from is None:
        return model
    path = Path(model.start_from)
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder to start from. Give a LoRA file or folder, a checkpoint or a run.")
    path = RunDir(path).checkpoint() if RunDir(path).holds_a_run else path
    check_weights(path)
    return replace(model, start_from=str(path))


def _settle(family: Family, device: torch.device, waits: bool = False) -> None:
    """All networks frozen, in evaluation mode, on the device; where the denoiser `waits`, it stays in main memory."""
    for network in family.pipeline.components.values():
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()
            if not (waits and network is family.network):
                network.to(device)
    if device.type == "cuda" and family.component == "unet":
        # what convolutions on tensor cores want; on a CPU it gains nothing (benchmarks/ladder.py)
        family.pipeline.vae.to(memory_format=torch.channels_last)
        for module in family.network.modules():  # one by one: quantised layers have no memory format
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)


def _trained_part(family: Family, model: Model, dtype: torch.dtype, keep_reference: bool, randomness: Randomness) -> adapter.Adapter:
    whole = holds_network(model, family.component)
    called = "UNet" if family.component == "unet" else "transformer"
    if whole and model.lora_rank > 0:
        raise RequestError(
            f"{model.start_from} holds a whole {called}, the preset asks for a LoRA of rank {model.lora_rank}. Use --set model.lora_rank=0."
        )
    if model.lora_rank == 0 and model.start_from and not whole:
        rank = lora_file.rank_of(Path(model.start_from))
        raise RequestError(f"{model.start_from} holds a LoRA of rank {rank}, the preset trains the whole {called}. Use --set model.lora_rank={rank}.")
    if model.lora_rank == 0:
        return adapter.WholeNetwork(family.network, keep_reference, dtype)
    targets = model.lora_targets or family.lora_targets
    new = (family.network, model.lora_rank, targets, randomness.initial_weights("lora"), model.lora_alpha)
    if model.start_from is None:
        return adapter.attach(*new)
    texts = text_lora(model)
    if texts and model.text_lora == "refuse":
        raise RequestError(
            f"{model.start_from} has {len(texts)} weights of text encoders ({texts[0]}, ...), which do not train. Keep them as a frozen part of the "
            "base with --set model.text_lora=fuse, or give a LoRA without them."
        )
    adapter.load(family, Path(model.start_from), adapter.START)
    adapter.attach(*new, name=adapter.BESIDE)
    return adapter.LoRABeside(family.network)


def text_lora(model: Model) -> list[str]:
    """The text-encoder weights in the LoRA of `model.start_from`."""
    if model.start_from is None or lora_file.whole_network(Path(model.start_from)):
        return []
    return lora_file.text_encoder_keys(Path(model.start_from))


# --- parts of a model -----------------------------------------------------------------------------------------------------
def holds_network(model: Model, part: str) -> bool:
    """Whether `model.start_from` is a checkpoint of full fine-tuning."""
    return model.start_from is not None and lora_file.whole_network(Path(model.start_from)) == part


def trained_network(cls: type, source: str, part: str, model: Model, dtype: torch.dtype) -> nn.Module:
    """The denoiser: of `model.start_from` where that holds a whole one, else the base model's. Raises RequestError."""
    options = {"torch_dtype": dtype} | quantise.options(model.quantise, cls, dtype)
    if holds_network(model, part):
        return component(cls, model.start_from, part, None, **options)
    return component(cls, source, part, model.revision, **options)


def read_pipeline(
    source: str, model: Model, dtype: torch.dtype, trained: str, absent: Collection[str] = (), texts_later: bool = False, **dtypes: torch.dtype
) -> DiffusionPipeline:
    """Every part that model_index.json lists, given to the pipeline's class; parts that are null there, or `absent`, are None.

    `trained` is the denoiser's name. `dtypes` names parts that are not of `dtype`, for example `vae=torch.float32`. With `texts_later` text
    encoders are None too, and `Family.read_text_encoders` reads them. Raises RequestError.
    """
    content = models.index(source, model.revision)
    called = models.pipeline_class(source, content)
    cls = getattr(diffusers, called)
    known, parts, unread = inspect.signature(cls.__init__).parameters, dict.fromkeys(absent), {}
    for name, entry in content.items():
        if name.startswith("_") or name not in known:
            continue
        if not isinstance(entry, list):  # a setting of the pipeline
            parts[name] = entry
        elif name in absent:
            continue
        elif entry[-1] is None:
            parts[name] = None
        else:
            kind, precision = _class_of(source, name, entry), dtypes.get(name, dtype)
            if name == trained:
                parts[name] = trained_network(kind, source, name, model, precision)
            elif name == "vae":
                parts[name] = vae(kind, source, model, precision)
            else:
                options = {"torch_dtype": precision} if issubclass(kind, nn.Module) else {}
                if quantise.applies(name, kind, trained):
                    options |= quantise.options(model.quantise, kind, precision)
                read = partial(component, kind, source, name, model.revision, **options)
                if texts_later and name.startswith("text_encoder"):
                    parts[name], unread[name] = None, read
                else:
                    parts[name] = read()
    missing = [name for name, one in known.items() if name not in (*parts, "self") and one.default is one.empty]
    if missing:
        raise RequestError(f"{source}: its model_index.json does not list {', '.join(missing)}, which a {called} needs. Download the model again.")
    pipeline = cls(**parts)
    pipeline.unread = unread
    return pipeline


def without_overflow(dtype: torch.dtype) -> torch.dtype:
    """The precision of a large text encoder: T5 and Qwen overflow in fp16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def vae(cls: type, source: str, model: Model, dtype: torch.dtype) -> nn.Module:
    """`model.vae`, which lies in a folder of its own or in a pipeline's, else the base model's. Raises RequestError."""
    if model.vae is None:
        return component(cls, source, "vae", model.revision, torch_dtype=dtype)
    return named_vae(cls, "model.vae", model.vae, dtype)


def named_vae(cls: type, key: str, name: str, dtype: torch.dtype) -> nn.Module:
    """A VAE from a folder or hub id, of its own or of a pipeline; `key` is the setting that names it. Raises RequestError."""
    folder = Path(name).expanduser()
    if folder.exists():
        return component(cls, str(folder), "vae" if (folder / "vae").is_dir() else "", None, torch_dtype=dtype)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise RequestError(f"{key} {name}: no such folder, and not a hub id (owner/name) either.")
    try:
        return component(cls, name, "", None, torch_dtype=dtype)
    except RequestError as error:
        with contextlib.suppress(RequestError):
            return component(cls, name, "vae", None, torch_dtype=dtype)
        raise error


def _class_of(source: str, name: str, entry: list[str]) -> type:
    """The class of one line of model_index.json: only of the two libraries, so that no folder can name code to import."""
    library, class_name = entry if len(entry) == 2 else (None, None)
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(class_name), None)
    if not isinstance(kind, type):
        raise RequestError(
            f"{source}: its model_index.json names {library}.{class_name} for {name}, which is not known. A newer library may have it."
        )
    return kind


def grid_of(pipeline: DiffusionPipeline, resolution: tuple[int, int], patch: int = 1) -> tuple[int, int]:
    """(height, width) in latents of a resolution in pixels. Raises RequestError unless it divides."""
    factor = pipeline.vae_scale_factor
    if any(side % (factor * patch) for side in resolution):
        raise RequestError(f"model.resolution {resolution[0]} x {resolution[1]}: both must be multiples of {factor * patch} for this model.")
    return resolution[0] // factor, resolution[1] // factor


def component(cls: type, source: str, subfolder: str, revision: str | None, **options: Any) -> Any:
    """`cls.from_pretrained` of one part; folders that hold only fp16 files are read too. Raises RequestError."""
    folder = Path(source) / subfolder
    local, network = Path(source).is_dir(), issubclass(cls, nn.Module)
    variants: tuple[str | None, ...] = (None, "fp16") if network else (None,)
    if local and not issubclass(cls, SchedulerMixin):
        variants = _variants(folder, cls) if network else _tokenizer_files(folder)
    if network:
        options |= {"output_loading_info": True}
    config_values.check_file(cls, source, subfolder, revision)
    error: Exception | None = None
    for variant in variants:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = cls.from_pretrained(source, subfolder=subfolder, revision=revision, **options, **({"variant": variant} if variant else {}))
            break
        except Exception as caught:  # noqa: BLE001 - diffusers, transformers, safetensors, pickle and torch each raise their own
            error = error or caught
    else:
        place = folder if local else f"{source}, {subfolder}" if subfolder else source
        advice = (
            "Copy or download the model again." if local else f"Fetch it with: hf download {source}" + (f" --revision {revision}" if revision else "")
        )
        raise RequestError(f"{place}: does not load as {cls.__name__}: {_reason(error)}. {advice}") from None
    if not network:
        return loaded
    network, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # the libraries would draw these at random and go on
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(f"{folder if local else source}: the {subfolder} weights lack {missing[0]}{more}. Copy or download the model again.")
    return network


def _variants(folder: Path, cls: type) -> tuple[str | None, ...]:
    """Which of a local network's weight files to read: the plain ones if there are any, else fp16's. Raises RequestError."""
    if not folder.is_dir():
        raise RequestError(f"{folder.parent}: incomplete, there is no {folder.name}/. Copy or download the whole model folder.")
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: config.json is missing. Copy or download the whole model folder.")
    if (folder / "adapter_config.json").exists():
        raise RequestError(f"{folder / 'adapter_config.json'}: makes the library load another model than this one. Remove it.")
    stems = TRANSFORMERS_STEMS if issubclass(cls, PreTrainedModel) else DIFFUSERS_STEMS
    names = [path.name for path in folder.iterdir()]
    weights = [name for name in names if name.startswith(stems) and (".safetensors" in name or ".bin" in name)]
    if not weights:
        expected = f"{stems[0]}.safetensors (or {stems[0]}.fp16.safetensors, or {stems[-1]}.bin)"
        raise RequestError(f"{folder}: no weights there, expected {expected}. Copy or download the whole model folder.")
    plain = [name for name in weights if ".fp16" not in name]
    for name in sorted(plain or weights):
        if name.endswith(".safetensors"):
            lora_file.check(folder / name)
    return (None,) if plain else ("fp16",)


def _tokenizer_files(folder: Path) -> tuple[None]:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise RequestError(
            f"{folder}: no tokenizer there, expected vocab.json and merges.txt (or tokenizer.json). Copy or download the whole model folder."
        )
    return (None,)


def _reason(error: Exception | None) -> str:
    first = first_line(error).rstrip(".:")
    return first if len(first) <= 200 else first[:200] + " ..."


def read_scheduler_config(source: str, revision: str | None) -> dict[str, Any]:
    folder = Path(source) / "scheduler"
    if Path(source).is_dir() and not (folder / "scheduler_config.json").is_file():
        raise RequestError(f"{folder}: scheduler_config.json is missing. Copy or download the whole model folder.")
    try:
        config = dict(DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder if Path(source).is_dir() else source}: cannot read its scheduler: {_reason(error)}.") from None
    config_values.check(config, folder)
    return config
