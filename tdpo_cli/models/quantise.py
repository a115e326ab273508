"""Frozen base weights in 8 or 4 bits: what each kind needs, and how a network is read with it. Imports no torch until one is read.

diffusers' and transformers' own quantisers do it while they load. They take linear layers; the rest keeps its precision.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from tdpo_cli.errors import RequestError, first_line

if TYPE_CHECKING:
    import torch

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}  # each is an extra of the same name as the kind


def check(kind: str | None, device: str | None = None) -> None:
    """Whether this machine can quantise so; `device` is cpu, cuda or not known yet. Raises RequestError."""
    if kind is None:
        return
    if kind == "nf4" and device == "cpu":
        raise RequestError(
            "model.quantise nf4 needs a CUDA device: diffusers loads 4-bit weights on a GPU only. On a CPU: --set model.quantise=int8, or none."
        )
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise RequestError(f"model.quantise {kind} needs {PACKAGES[kind]}: pip install 'tdpo[{kind}]'. Or leave it out: --set model.quantise=none")


def applies(part: str, cls: type, trained: str) -> bool:
    """Whether a part of a pipeline is quantised: the denoiser, and text encoders that are language models. CLIP is small beside them."""
    return part == trained or (part.startswith("text_encoder") and not cls.__name__.startswith("CLIP"))


def options(kind: str | None, cls: type, dtype: torch.dtype) -> dict[str, Any]:
    """What `cls.from_pretrained` takes to quantise while it loads and to compute in `dtype`. Raises RequestError."""
    if kind is None:
        return {}
    import diffusers
    import transformers

    library = transformers if issubclass(cls, transformers.PreTrainedModel) else diffusers
    try:
        if kind == "nf4":
            config = library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            from torchao.quantization import Int8WeightOnlyConfig

            config = library.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    except (ImportError, TypeError, ValueError, AttributeError) as error:  # versions that do not fit each other
        raise RequestError(
            f"model.quantise {kind}: this {library.__name__} and {PACKAGES[kind]} do not fit each other: {first_line(error)}. "
            f"Update both: pip install -U 'tdpo[{kind}]'"
        ) from None
    return {"quantization_config": config}
