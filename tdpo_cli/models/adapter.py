"""What trains of a network: a low-rank adapter, the whole network, or nothing.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, through peft.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models import lora_file
from tdpo_cli.models.family import Family

ADAPTER = "policy"


class Adapter(Protocol):
    """What trains, how the network computes with and without it, and how it is saved."""

    trainable: dict[str, nn.Parameter]

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        """Calls inside use the trained weights; with `reference` the weights before any training."""

    def save(self, family: Family, folder: Path) -> None: ...


class Frozen:
    """Nothing trains: base models, and checkpoints that are only sampled."""

    def __init__(self) -> None:
        self.trainable: dict[str, nn.Parameter] = {}

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def save(self, family: Family, folder: Path) -> None:
        raise AssertionError("a policy that does not train has nothing to save")


class LoRA:
    """W + scale * up @ down on the family's target layers; adapter weights are fp32. The reference is the network without it."""

    def __init__(self, network: nn.Module):
        self.trainable = parameters(network)

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        return _switched_off(family.network) if reference else contextlib.nullcontext()

    def save(self, family: Family, folder: Path) -> None:
        """Write the file that diffusers' `load_lora_weights(folder)` reads, with rank and alpha in its metadata."""
        config = {name: _plain(value) for name, value in family.network.peft_config[ADAPTER].to_dict().items()}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(family.network, adapter_name=ADAPTER).items()}
        # without the metadata a loader takes alpha = rank, silently
        parts = {f"{family.component}_lora_layers": state, f"{family.component}_lora_adapter_metadata": config}
        type(family.pipeline).save_lora_weights(folder, **parts, weight_name=lora_file.FILE)
        lora_file.sort_metadata(folder / lora_file.FILE)


class WholeNetwork:
    """Full fine-tuning: fp32 weights, computing in `compute_dtype`; the reference is a frozen copy."""

    def __init__(self, network: nn.Module, keep_reference: bool, compute_dtype: torch.dtype):
        self.reference = copy.deepcopy(network) if keep_reference else None
        network.float().requires_grad_(True)
        self.autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self.trainable = dict(network.named_parameters())

    @contextlib.contextmanager
    def computing(self, family: Family, reference: bool) -> Iterator[None]:
        autocast = torch.autocast(family.device.type, self.autocast_dtype) if self.autocast_dtype else contextlib.nullcontext()
        trained = family.network
        if reference and self.reference is not None:
            family.network = self.reference
        try:
            with autocast:
                yield
        finally:
            family.network = trained

    def save(self, family: Family, folder: Path) -> None:
        """Write the whole network as `unet/` or `transformer/`."""
        family.network.save_pretrained(folder / family.component)


@contextlib.contextmanager
def _switched_off(network: nn.Module) -> Iterator[None]:
    """Compute without the adapter, without a second copy of the network."""
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


# --- attaching ----------------------------------------------------------------------------------------------------------
def attach(network: nn.Module, rank: int, targets: Sequence[str], generator: torch.Generator) -> LoRA:
    """Add a new adapter: alpha = rank; down ~ N(0, (1/rank)^2), up = 0, so that it changes nothing yet."""
    # peft's own draws come from the global generator and are overwritten at once: keep them from being seen
    with torch.random.fork_rng(devices=[]):
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=ADAPTER)
    for name, parameter in parameters(network).items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 1 / rank, generator=generator))
        else:
            parameter.data.zero_()
    return LoRA(network)


def load(family: Family, path: Path) -> int:
    """Add the adapter in a file (diffusers', peft's or kohya's key names), frozen. -> its rank. Raises RequestError."""
    file, network, prefix = lora_file.find(path), family.network, family.component
    lora_file.check(file)
    options = {"unet_config": network.config} if prefix == "unet" else {}
    state, *alphas, metadata = type(family.pipeline).lora_state_dict(
        str(file), **options, local_files_only=True, use_safetensors=True, return_lora_metadata=True
    )
    if not any("lora" in key for key in state):
        raise RequestError(f"{file}: no LoRA weights in it.")
    state = {key if key.startswith(f"{prefix}.") else f"{prefix}.{key}": value for key, value in state.items() if "text_encoder" not in key}
    try:
        network.load_lora_adapter(state, prefix=prefix, network_alphas=alphas[0] if alphas else None, metadata=metadata, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise RequestError(f"{file}: these LoRA weights do not fit the base model: {first_line(error)}") from None
    loaded = parameters(network)
    if not loaded:
        raise RequestError(f"{file}: no LoRA weights for this {prefix} there (keys should start with `{prefix}.`).")
    for parameter in loaded.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    return next(p.shape[0] for name, p in loaded.items() if "lora_A" in name)


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by name, in the order of the network's modules."""
    return {name: parameter for name, parameter in network.named_parameters() if "lora_" in name}


def set_scale(network: nn.Module, scale: float) -> None:
    """Multiply the adapter's contribution (1 = as trained)."""
    network.set_adapters([ADAPTER], weights=[scale])


def _plain(value: object) -> object:
    """What JSON can hold: sets become sorted lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value
