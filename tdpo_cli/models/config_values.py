"""Numbers in a model folder's configs, checked before a library computes with them: the folder may be damaged, or a stranger's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from torch import nn
from transformers import PreTrainedModel

from tdpo_cli.errors import RequestError
from tdpo_cli.storage import disk

LARGEST_SIDE = 8192  # of a latent, as of an image in `tdpo score`
MOST_STEPS = 100_000  # that a model was trained with; published ones have 1,000


def _whole(most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= most


def _size(value: Any) -> bool:
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(map(_whole(LARGEST_SIDE), sides))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample_size": (_size, f"a whole number from 1 to {LARGEST_SIDE}, or two"),
    "num_train_timesteps": (_whole(MOST_STEPS), f"a whole number from 1 to {MOST_STEPS}"),
    "timestep_spacing": (lambda value: value in ("leading", "trailing", "linspace"), "leading, trailing or linspace"),
    "scaling_factor": (lambda value: _number(value) and value != 0, "a number other than 0"),
    "shift_factor": (_number, "a number"),
}


def check(config: Mapping[str, Any], place: object) -> None:
    """RequestError for a value that is not of its kind or beyond all reason; null is the library's own to judge."""
    for key, (right, expected) in RULES.items():
        if config.get(key) is not None and not right(config[key]):
            raise RequestError(f"{place}: {key} is {str(config[key])[:60]!r} in its config, expected {expected}. Copy or download the model again.")


def check_file(cls: type, source: str, subfolder: str, revision: str | None) -> None:
    """The config of a part, before it is built: diffusers' numbers, and of transformers what would fetch code from a hub. Raises RequestError."""
    if issubclass(cls, PreTrainedModel):
        _check_attention(Path(source) / subfolder / "config.json")
    if issubclass(cls, ConfigMixin):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = cls.load_config(source, subfolder=subfolder, revision=revision)
        except (OSError, ValueError):
            return  # loading says what is missing
        check(config, f"{source}/{subfolder}".rstrip("/"))


def _check_attention(file: Path) -> None:
    """A file on this disk that names a kernel of a hub as its attention is refused: a kernel is a program."""
    try:
        config = disk.read_json(file, dict)
    except FileNotFoundError:
        return  # a hub id, or incomplete
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if "/" in str(config.get(key)):
            raise RequestError(f"{file}: {key} names a program from a hub, {str(config[key])[:60]!r}, which would run here. Remove it.")


def bound_tokenizers(parts: Mapping[str, Any], source: str) -> None:
    """A tokenizer without a limit, which transformers writes as 10^30, gets its text encoder's. Raises RequestError for anything but a limit."""
    for name, tokenizer in parts.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        limit = getattr(tokenizer, "model_max_length", None)
        if type(limit) not in (int, float) or not limit >= 1:
            raise RequestError(f"{source}/{name}: model_max_length is {str(limit)[:60]!r} in its config, expected a whole number from 1.")
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(encoder.config, "max_position_embeddings", None) if isinstance(encoder, nn.Module) else None
        if type(positions) is int and limit > positions:
            tokenizer.model_max_length = positions
