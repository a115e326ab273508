"""A LoRA on disk: which file it is, whether it is whole, what rank it has. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tdpo_cli.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "transformer")  # what a denoising network is called in a pipeline


def whole_network(path: Path) -> str | None:
    """The folder with a whole network, `unet` or `transformer`, in a checkpoint of full fine-tuning; None in any other."""
    return next((name for name in COMPONENTS if (path / name).is_dir()), None)


def find(path: Path) -> Path:
    """The weights file of a LoRA folder, or the file itself. Raises RequestError."""
    if path.is_file():
        return path
    candidates = [path / FILE] if (path / FILE).is_file() else sorted(path.glob("*.safetensors"))
    candidates = [file for file in candidates if file.name != "critic.safetensors"]
    if not candidates:
        raise RequestError(f"{path}: no LoRA weights there ({FILE}).")
    if len(candidates) > 1:
        raise RequestError(f"{path}: several LoRA files there ({', '.join(f.name for f in candidates)}); name one.")
    return candidates[0]


def read(path: Path) -> dict[str, Tensor]:
    """A LoRA file's tensors. Raises RequestError for a damaged file."""
    from safetensors.torch import load_file

    file = find(path)
    check_values(file)
    return load_file(file)


def check_values(file: Path) -> None:
    """RequestError for weights that are not finite, and for half a pair: both load silently, as black images or as nothing."""
    from safetensors.torch import load_file

    check(file)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RequestError(f"{file}: {name} holds values that are not finite (NaN or infinity): the training that wrote it had failed.")
        for down, up in PAIRS:
            for one, other in ((down, up), (up, down)):
                if one in name and name.replace(one, other) not in tensors:
                    raise RequestError(f"{file}: {name} has no {name.replace(one, other)}: the file is incomplete. Copy or download it again.")


def check(file: Path) -> None:
    """RequestError unless the header of a safetensors file can be read and its length is right."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{file}: damaged, not a readable safetensors file ({error}). Copy or download it again.") from None


# the two halves of a layer's LoRA, as peft, diffusers, older diffusers and kohya name them
PAIRS = ((".lora_A.", ".lora_B."), (".lora.down.", ".lora.up."), ("_lora.down.", "_lora.up."), (".lora_down.", ".lora_up."))
# what marks a file of another method, and its name
OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT", "boft_": "BOFT",
    "lora_mid": "LoCon with a middle matrix", "glora": "GLoRA",
}  # fmt: skip


def check_kind(file: Path) -> None:
    """RequestError for a damaged file, and for adapters that are no LoRA: they would load in part, or as something else."""
    check(file)
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    for mark, kind in OTHER_KINDS.items():
        found = next((name for name in names if mark in name), None)
        if found is not None:
            raise RequestError(f"{file}: a {kind} adapter ({found}). Only LoRA is supported: merge it into a model folder, or give a LoRA.")


def text_encoder_keys(path: Path) -> list[str]:
    """The names of a file's tensors that belong to a text encoder. Raises RequestError."""
    file = find(path)
    check(file)
    with safe_open(file, framework="pt") as opened:
        return sorted(name for name in opened.keys() if name.startswith(("text_encoder", "lora_te")))


def alpha_of(path: Path) -> Callable[[str, int], float]:
    """(NETWORK.MODULE, rank) -> that layer's alpha, as the file's metadata says; without metadata the rank. Raises RequestError."""
    file = find(path)
    check(file)
    with safe_open(file, framework="pt") as opened:
        try:
            config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{file}: its metadata is damaged: {error}") from None

    def alpha(layer: str, rank: int) -> float:
        network, _, module = layer.partition(".")
        patterns = config.get(f"{network}.alpha_pattern") or {}
        # as peft reads a pattern: the end of the name
        found = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), None)
        value = found if found is not None else config.get(f"{network}.lora_alpha", rank)
        return float(value * rank**0.5 if config.get(f"{network}.use_rslora") else value)

    return alpha


def rank_of(path: Path) -> int:
    """The rank of the adapter in a file. Raises RequestError."""
    down = [tensor for name, tensor in read(path).items() if ".lora_A." in name or "lora_down" in name or ".lora.down." in name]
    if not down:
        raise RequestError(f"{find(path)}: no LoRA weights in it.")
    return down[0].shape[0]


def sort_metadata(file: Path) -> None:
    """Rewrite a safetensors file with its metadata in order: the library writes them in a random one, and equal files should be equal bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = dict(sorted(header.pop("__metadata__", {}).items()))
    written = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors stay aligned
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
