"""Low-rank adapters on a UNet's attention (Hu et al. 2021, https://arxiv.org/abs/2106.09685), through peft."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.storage.checkpoints import LORA_FILE as FILE

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = "policy"


def attach(unet: nn.Module, rank: int, generator: torch.Generator) -> None:
    """W + up @ down on every attention projection, alpha = rank; down ~ N(0, (1/rank)^2), up = 0. Adapter weights are fp32."""
    # peft's own draws come from the global generator and are overwritten at once: keep them from being seen
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=ADAPTER)
    for name, parameter in parameters(unet).items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 1 / rank, generator=generator))
        else:
            parameter.data.zero_()


def parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by name, in the order of the network's modules."""
    return {name: parameter for name, parameter in unet.named_parameters() if "lora_" in name}


@contextlib.contextmanager
def switched_off(unet: nn.Module) -> Iterator[None]:
    """The network before any training, without a second copy of it."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def save(unet: nn.Module, folder: Path) -> None:
    """In the layout of diffusers' `load_lora_weights(folder)`: keys start with `unet.`."""
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    save_file({f"unet.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / FILE)


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
    file = find(path)
    check(file)
    return load_file(file)


def check(file: Path) -> None:
    """RequestError unless the header of a safetensors file can be read and its length is right."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{file}: damaged, not a readable safetensors file ({error}). Copy or download it again.") from None


def rank_of(path: Path) -> int:
    """The rank of the adapter in a file. Raises RequestError."""
    down = [tensor for name, tensor in read(path).items() if ".lora_A." in name or "lora_down" in name or ".lora.down." in name]
    if not down:
        raise RequestError(f"{find(path)}: no LoRA weights in it.")
    return down[0].shape[0]


def load(unet: nn.Module, path: Path) -> int:
    """Attach the adapter in a file (diffusers', peft's or kohya's key names). -> its rank. Raises RequestError."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    file = find(path)
    read(file)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file), unet_config=unet.config, local_files_only=True)
    if not any("lora" in key for key in state):
        raise RequestError(f"{file}: no LoRA weights in it.")
    state = {key if key.startswith("unet.") else f"unet.{key}": value for key, value in state.items() if "text_encoder" not in key}
    try:
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise RequestError(f"{file}: these LoRA weights do not fit the base model: {first_line(error)}") from None
    loaded = parameters(unet)
    if not loaded:
        raise RequestError(f"{file}: no LoRA weights for this UNet there (keys should start with `unet.`).")
    for parameter in loaded.values():
        parameter.data = parameter.data.float()
    return next(p.shape[0] for name, p in loaded.items() if "lora_A" in name)


def set_scale(unet: nn.Module, scale: float) -> None:
    """Multiply the adapter's contribution (1 = as trained)."""
    unet.set_adapters([ADAPTER], weights=[scale])
