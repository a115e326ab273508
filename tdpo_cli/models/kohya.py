"""LoRA weights in kohya-ss' names and layout, which ComfyUI, A1111 and their kin read."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tdpo_cli.errors import RequestError

PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}
OURS = re.compile(r"unet\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
# width of the text embeddings that cross-attention reads -> Stable Diffusion's generation, in kohya's word
GENERATIONS = {768: "sd_v1", 1024: "sd_v2"}


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`unet.MODULE.lora_A.weight` [r,in], `.lora_B.weight` [out,r] -> `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    MODULE is diffusers' name of the layer, with underscores for dots. A reader adds up @ down * alpha / r to its weight;
    ours has no alpha, which means r. Raises RequestError for other keys.
    """
    rank = rank_of(state)
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = OURS.fullmatch(key)
        name = f"lora_unet_{match['module'].replace('.', '_')}"
        converted[f"{name}.{PARTS[match['part']]}.weight"] = tensor.contiguous()
        converted[f"{name}.alpha"] = torch.tensor(float(rank))
    return converted


def rank_of(state: Mapping[str, Tensor]) -> int:
    """The one rank of all pairs. Raises RequestError where there is none, or weights that are no LoRA of a UNet in diffusers' names."""
    odd = next((key for key in state if not OURS.fullmatch(key)), None)
    if odd is not None:
        if odd.startswith("lora_unet_"):
            raise RequestError(f"these weights are in kohya's format already ({odd}).")
        raise RequestError(f"only LoRA weights of a UNet in diffusers' names (unet.*.lora_A.weight) can be converted; found {odd}.")
    names = {key.replace(".lora_B.", ".lora_A.") for key in state}
    lonely = next((key for key in sorted(names) for pair in (key, key.replace(".lora_A.", ".lora_B.")) if pair not in state), None)
    if lonely is not None:
        raise RequestError(f"one half of a pair of LoRA weights is missing: {lonely}.")
    ranks = sorted({state[key].shape[0] for key in names})
    if len(ranks) != 1:
        raise RequestError(f"one rank is expected in a LoRA file, found {', '.join(map(str, ranks)) or 'no weights'}.")
    return ranks[0]


def metadata(state: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """What the tools show of a file: rank, alpha, the base's generation as far as the weights tell it, and the file's name."""
    rank = rank_of(state)
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)), "ss_output_name": name}
    widths = {tensor.shape[1] for key, tensor in state.items() if key.endswith("attn2.to_k.lora_A.weight")}
    generation = GENERATIONS.get(widths.pop()) if len(widths) == 1 else None
    if generation:
        told |= {"ss_base_model_version": generation, "ss_v2": str(generation == "sd_v2")}
    if generation == "sd_v1":  # of 2.x the specification wants to know whether it predicts v, which these weights do not say
        told |= {
            "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
            "modelspec.title": name, "modelspec.resolution": "512x512",
        }  # fmt: skip
    return told
