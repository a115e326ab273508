"""Read the parts of a diffusers model, a folder or a hub id, and say clearly what is missing or does not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models import adapter

# the files of a network's weights, without variant and suffix: diffusers', and transformers' (safetensors, pickle)
STEMS = {CLIPTextModel: ("model", "pytorch_model")}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def component(cls: type, source: str, subfolder: str, revision: str | None, **options: Any) -> Any:
    """`cls.from_pretrained` of one part; folders that hold only fp16 files are read too. Raises RequestError."""
    folder = Path(source) / subfolder
    local, network = Path(source).is_dir(), issubclass(cls, nn.Module)
    variants: tuple[str | None, ...] = (None, "fp16") if network else (None,)
    if local:
        variants = _variants(folder, cls) if network else _tokenizer_files(folder)
    if network:
        options |= {"output_loading_info": True}
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
        place = folder if local else f"{source}, {subfolder}"
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
    stems = STEMS.get(cls, ("diffusion_pytorch_model",))
    names = [path.name for path in folder.iterdir()]
    weights = [name for name in names if name.startswith(stems) and (".safetensors" in name or ".bin" in name)]
    if not weights:
        expected = f"{stems[0]}.safetensors (or {stems[0]}.fp16.safetensors, or {stems[-1]}.bin)"
        raise RequestError(f"{folder}: no weights there, expected {expected}. Copy or download the whole model folder.")
    plain = [name for name in weights if ".fp16" not in name]
    for name in sorted(plain or weights):
        if name.endswith(".safetensors"):
            adapter.check(folder / name)
    return (None,) if plain else ("fp16",)


def _tokenizer_files(folder: Path) -> tuple[None]:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise RequestError(
            f"{folder}: no tokenizer there, expected vocab.json and merges.txt (or tokenizer.json). Copy or download the whole model folder."
        )
    return (None,)


def must_fit(source: str, unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """The parts belong together, and the UNet is one that takes latents and a prompt only. Raises RequestError."""
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise RequestError(
            f"{source}: its UNet takes {channels} channels and its VAE makes {latent}: a model for inpainting, upscaling or editing. "
            "Only text-to-image models can be trained."
        )
    seen, given = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if seen != given:
        raise RequestError(f"{source}: its UNet reads prompts {seen} wide and its text encoder makes them {given} wide: parts of different models.")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise RequestError(
            f"{source}: its tokenizer knows {len(tokenizer)} tokens and its text encoder {text_encoder.config.vocab_size}: parts of different models."
        )


def latent_size(unet: nn.Module) -> tuple[int, int]:
    size = unet.config.sample_size
    if size is None:
        raise RequestError("the UNet's config.json does not say sample_size, the side of a latent (64 for 512 pixels).")
    height, width = (size, size) if isinstance(size, int) else size
    # the first Stable Diffusion uploads said 32 and meant 64; diffusers' own pipeline mends them alike
    if size == 32 and _version(unet.config.get("_diffusers_version", "9")) < (0, 9):
        height = width = 64
    return height, width


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _reason(error: Exception | None) -> str:
    first = first_line(error).rstrip(".:")
    return first if len(first) <= 200 else first[:200] + " ..."


def read_scheduler_config(source: str, revision: str | None) -> dict[str, Any]:
    folder = Path(source) / "scheduler"
    if Path(source).is_dir() and not (folder / "scheduler_config.json").is_file():
        raise RequestError(f"{folder}: scheduler_config.json is missing. Copy or download the whole model folder.")
    try:
        return dict(DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder if Path(source).is_dir() else source}: cannot read its scheduler: {_reason(error)}.") from None
