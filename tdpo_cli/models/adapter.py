"""What trains of a network: a low-rank adapter, the whole network, or nothing.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, through peft.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models import lora_file
from tdpo_cli.models.family import Family

ADAPTER = "policy"
# with `model.start_from`: the loaded LoRA, which stays as it is, and the new one that trains
START, BESIDE = "start", "beside"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class Adapter(Protocol):
    """What trains, how the network computes with and without it, and how it is saved."""

    trainable: dict[str, nn.Parameter]

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        """Calls inside use the trained weights; with `reference` the weights before any training."""

    def save(self, family: Family, folder: Path) -> None: ...

    def recognise(self, family: Family, state: dict[str, Tensor]) -> None:
        """Go on as the version did that saved the weights `state`, which are loaded next."""


class Frozen:
    """Nothing trains: base models, and checkpoints that are only sampled."""

    def __init__(self) -> None:
        self.trainable: dict[str, nn.Parameter] = {}

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def save(self, family: Family, folder: Path) -> None:
        raise AssertionError("a policy that does not train has nothing to save")

    def recognise(self, family: Family, state: dict[str, Tensor]) -> None:
        """Versions do not differ."""


class LoRA:
    """W + alpha / rank * up @ down on the family's target layers; the weights are fp32. The reference is the network without it."""

    def __init__(self, network: nn.Module, name: str = ADAPTER):
        self.name, self.trainable = name, parameters(network, name)

    def computing(self, family: Family, reference: bool) -> contextlib.AbstractContextManager:
        return _switched_off(family.network) if reference else contextlib.nullcontext()

    def save(self, family: Family, folder: Path) -> None:
        """Write the file that diffusers' `load_lora_weights(folder)` reads, with rank and alpha in its metadata."""
        _save(family, folder, {family.component: own_part(family.network, self.name)})

    def recognise(self, family: Family, state: dict[str, Tensor]) -> None:
        """Versions do not differ."""


class LoRABeside(LoRA):
    """A new LoRA on a network with a loaded one, which is frozen and part of the reference."""

    def __init__(self, network: nn.Module):
        super().__init__(network, BESIDE)
        self.reference: tuple[str, ...] = (START,)
        activate(network, (*self.reference, BESIDE))

    @contextlib.contextmanager
    def computing(self, family: Family, reference: bool) -> Iterator[None]:
        if not reference:
            yield
            return
        activate(family.network, self.reference)
        try:
            yield
        finally:
            activate(family.network, (*self.reference, BESIDE))

    def save(self, family: Family, folder: Path) -> None:
        """Write both LoRAs as one, and the loaded one's text-encoder weights."""
        if not self.reference:
            return super().save(family, folder)
        parts = {family.component: _concatenated([own_part(family.network, name) for name in (START, BESIDE)])}
        for name in TEXT_ENCODERS:
            encoder = getattr(family.pipeline, name, None)
            if START in getattr(encoder, "peft_config", {}):
                parts[name] = own_part(encoder, START)
        _save(family, folder, parts)

    def recognise(self, family: Family, state: dict[str, Tensor]) -> None:
        """In 0.1 the loaded weights themselves trained, under another name, and the reference was the base model: so it stays."""
        if any(f".{ADAPTER}." in name for name in state):
            self.reference = ()
            activate(family.network, (BESIDE,))
            self.trainable = {name.replace(f".{BESIDE}.", f".{ADAPTER}."): parameter for name, parameter in self.trainable.items()}


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

    def recognise(self, family: Family, state: dict[str, Tensor]) -> None:
        """Versions do not differ."""


@contextlib.contextmanager
def _switched_off(network: nn.Module) -> Iterator[None]:
    """Compute without the adapter, without a second copy of the network."""
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


def activate(network: nn.Module, names: Sequence[str]) -> None:
    """Compute with these adapters and no others; peft's own call would also change which weights train."""
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = list(names)


# --- attaching ----------------------------------------------------------------------------------------------------------
def attach(
    network: nn.Module, rank: int, targets: Sequence[str], generator: torch.Generator, alpha: float | None = None, name: str = ADAPTER
) -> LoRA:
    """Add a new adapter that trains: down ~ N(0, (1/rank)^2), up = 0, so that it changes nothing yet. Raises RequestError."""
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    # peft's own draws come from the global generator and are overwritten at once: keep them from being seen
    with torch.random.fork_rng(devices=[]):
        try:
            network.add_adapter(config, adapter_name=name)
        except ValueError as error:  # no layer of these names, or one that cannot have a LoRA
            raise RequestError(f"model.lora_targets {', '.join(targets)}: {first_line(error)[:200]}") from None
    for parameter_name, parameter in parameters(network, name).items():
        parameter.data = parameter.data.float()
        if "lora_A" in parameter_name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 1 / rank, generator=generator))
        else:
            parameter.data.zero_()
    return LoRA(network, name)


def load(family: Family, path: Path, name: str = ADAPTER) -> None:
    """Add the LoRA of a file (diffusers', peft's or kohya's key names), frozen, text encoders' weights too. Raises RequestError."""
    file, network, prefix = lora_file.find(path), family.network, family.component
    lora_file.check_kind(file)
    lora_file.check_values(file)
    options = {"unet_config": network.config} if prefix == "unet" else {}
    pipeline = type(family.pipeline)
    # folder and name apart: offline, an older diffusers wants the name, of a file too
    options |= {"weight_name": file.name, "local_files_only": True, "use_safetensors": True, "return_lora_metadata": True}
    try:
        state, *alphas, metadata = pipeline.lora_state_dict(str(file.parent), **options)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise RequestError(f"{file}: the names of its weights are not known: {first_line(error)[:200]}") from None
    if not any("lora" in key for key in state):
        raise RequestError(f"{file}: no LoRA weights in it.")
    state = _folded(state, alphas[0] if alphas else None)
    texts = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    state = {key if key.startswith(f"{prefix}.") else f"{prefix}.{key}": value for key, value in state.items() if key not in texts}
    try:
        if state:
            network.load_lora_adapter(state, prefix=prefix, network_alphas=None, metadata=metadata, adapter_name=name)
        for part in TEXT_ENCODERS:
            if any(key.startswith(f"{part}.") for key in texts):
                encoder = getattr(family.pipeline, part)
                pipeline.load_lora_into_text_encoder(texts, None, encoder, prefix=part, adapter_name=name, metadata=metadata)
                encoder.requires_grad_(False)
    except (ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        if "PEFT" in str(error):  # transformers' word for the LoRAs of its text encoders
            raise RequestError(f"{file}: its weights of text encoders need another peft: {first_line(error)}") from None
        raise RequestError(f"{file}: these LoRA weights do not fit the base model: {first_line(error)}") from None
    loaded = parameters(network, name)
    if not loaded:
        raise RequestError(f"{file}: no LoRA weights for this {prefix} there (keys should start with `{prefix}.`).")
    if len(loaded) < len(state):  # the library leaves out what it does not know, without a word
        layers = {key.partition(".lora_")[0] for key in loaded}
        unknown = [key for key in state if key.removeprefix(f"{prefix}.").partition(".lora")[0] not in layers]
        shown = unknown[0] if unknown else "some"
        raise RequestError(f"{file}: {len(state) - len(loaded)} of its {len(state)} weights fit no layer of this {prefix}, as {shown}.")
    for parameter in loaded.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)


def _folded(state: dict[str, Tensor], alphas: dict[str, float] | None) -> dict[str, Tensor]:
    """alpha / rank of each layer multiplied into `up`: the library's loader takes one alpha for layers whose alphas differ."""
    folded = dict(state)
    for key, up in state.items():
        if ".up." in key and alphas:
            down = key.replace(".up.", ".down.")
            alpha = next((alphas[name] for name in (f"{down.split('.lora.')[0]}.alpha", f"{down}.alpha") if name in alphas), None)
            if alpha is not None and alpha != len(state[down]):
                folded[key] = up.float() * (alpha / len(state[down]))
    return folded


def parameters(network: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """An adapter's weights by name, in the order of the network's modules."""
    return {key: parameter for key, parameter in network.named_parameters() if "lora_" in key and f".{name}." in key}


def set_scale(family: Family, scale: float) -> None:
    """Multiply the adapter's contribution (1 = as trained), in the text encoders too."""
    for network in (family.network, *(getattr(family.pipeline, name, None) for name in TEXT_ENCODERS)):
        for module in network.modules() if network is not None else ():
            if isinstance(module, BaseTunerLayer) and ADAPTER in getattr(module, "scaling", {}):
                module.set_scale(ADAPTER, scale)


# --- saving -------------------------------------------------------------------------------------------------------------
Part = tuple[dict[str, Tensor], dict[str, object]]  # a LoRA's tensors, on the CPU, and its peft config


def own_part(network: nn.Module, name: str) -> Part:
    """An adapter of a network as its file holds it."""
    config = {key: _plain(value) for key, value in network.peft_config[name].to_dict().items()}
    own = parameters(network, name)  # not state_dict(), which re-shards a sharded network, on this process alone
    return {key: tensor.detach().cpu().contiguous() for key, tensor in get_peft_model_state_dict(network, own, adapter_name=name).items()}, config


def _concatenated(parts: Sequence[Part]) -> Part:
    """Several LoRAs of one network as one: the ranks of a layer follow each other, alpha / rank is multiplied into `up`."""
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for state, config in parts:
        for key, down in state.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up = state[f"{layer}.lora_B.weight"]
                layers.setdefault(layer, []).append((down.float(), up.float() * _scale(config, layer, len(down))))
    state: dict[str, Tensor] = {}
    for layer, pairs in layers.items():
        state[f"{layer}.lora_A.weight"] = torch.cat([down for down, _ in pairs])
        state[f"{layer}.lora_B.weight"] = torch.cat([up for _, up in pairs], dim=1)
    ranks = {layer: sum(len(down) for down, _ in pairs) for layer, pairs in layers.items()}
    largest = max(ranks.values())
    others = {layer: rank for layer, rank in ranks.items() if rank != largest}
    config = LoraConfig(r=largest, lora_alpha=largest, target_modules=sorted(layers), rank_pattern=others, alpha_pattern=dict(others)).to_dict()
    return state, {key: _plain(value) for key, value in config.items()}


def _scale(config: dict, layer: str, rank: int) -> float:
    """alpha / rank of a layer, as peft reads its config."""
    pattern = next((one for one in config["alpha_pattern"] if re.match(rf"(.*\.)?({one})$", layer)), None)
    alpha = config["lora_alpha"] if pattern is None else config["alpha_pattern"][pattern]
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def _save(family: Family, folder: Path, parts: dict[str, Part]) -> None:
    given: dict[str, object] = {}
    for name, (state, config) in parts.items():
        # without the metadata a loader takes alpha = rank, silently
        given |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": config}
    type(family.pipeline).save_lora_weights(folder, **given, weight_name=lora_file.FILE)
    lora_file.sort_metadata(folder / lora_file.FILE)


def _plain(value: object) -> object:
    """What JSON can hold: sets become sorted lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value
