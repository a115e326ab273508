"""LoRA weights in kohya-ss' names and layout, which sd-scripts, ComfyUI, A1111 and their kin read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tdpo_cli.errors import RequestError

PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}
OURS = re.compile(r"(?P<network>unet|transformer|text_encoder|text_encoder_2)\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
# width of the text embeddings that cross-attention reads -> Stable Diffusion's generation, in kohya's word
GENERATIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
# of SDXL, kohya keeps the names of the original code: parts outside the blocks, and inside a ResNet
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>attentions|resnets|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)")
MIDDLE = re.compile(r"mid_block\.(?P<kind>attentions|resnets)\.(?P<index>\d+)\.(?P<rest>.+)")


def convert(state: Mapping[str, Tensor], sdxl_layers: int | None = None, alpha_of: Callable[[str, int], float] | None = None) -> dict[str, Tensor]:
    """`unet.MODULE.lora_A.weight` [r,in], `.lora_B.weight` [out,r] -> `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    MODULE is diffusers' name of the layer with underscores for dots; for SDXL, whose UNet has `sdxl_layers` per block, the original
    code's. Of transformers only Qwen-Image is converted, by the first rule. A reader adds up @ down * alpha / r to its weight;
    `alpha_of(NETWORK.MODULE, r)` is r where it is not given. Raises RequestError for other keys.
    """
    _check(state)
    attended = {match.group(0) for key in state if (match := re.match(r"unet\.up_blocks\.\d+\.attentions", key))}
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = OURS.fullmatch(key)
        network, module = match["network"], match["module"]
        if network == "transformer":
            name = "lora_unet_" + module
        elif network == "unet":
            attends = f"unet.{'.'.join(module.split('.')[:2])}.attentions" in attended
            name = "lora_unet_" + (original_name(module, sdxl_layers, attends) if sdxl_layers else module)
        else:  # transformers 5 leaves out `text_model`, which every reader expects
            number = "" if sdxl_layers is None else "2" if network == "text_encoder_2" else "1"
            name = f"lora_te{number}_text_model." + module.removeprefix("text_model.")
        name, rank = name.replace(".", "_"), state[key.replace(".lora_B.", ".lora_A.")].shape[0]
        converted[f"{name}.{PARTS[match['part']]}.weight"] = tensor.contiguous()
        converted[f"{name}.alpha"] = torch.tensor(float(alpha_of(f"{network}.{module}", rank) if alpha_of else rank))
    return converted


def original_name(module: str, layers: int, attends: bool = True) -> str:
    """diffusers' name of a layer of SDXL's UNet -> the original code's, where blocks are numbered through.

    `attends`: whether its level has attention, after which an upsampler comes third, not second. Raises RequestError for a name not known.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    if match := MIDDLE.fullmatch(module):
        place = 1 if match["kind"] == "attentions" else 2 * int(match["index"])
        return f"middle_block.{place}.{_inside(match['kind'], match['rest'])}"
    if match := BLOCK.fullmatch(module):
        level, index, kind, rest = int(match["level"]), int(match["index"]), match["kind"], match["rest"]
        inner = _inside(kind, rest)
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{level * (layers + 1) + layers}.{2 if attends else 1}.conv"
        block = f"input_blocks.{1 + level * (layers + 1) + index}" if match["side"] == "down" else f"output_blocks.{level * (layers + 1) + index}"
        return f"{block}.{1 if kind == 'attentions' else 0}.{inner}"
    raise RequestError(f"kohya's format has no name for the layer {module}.")


def _inside(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind == "resnets" else rest


def _check(state: Mapping[str, Tensor]) -> None:
    """RequestError unless all weights are pairs of a LoRA in diffusers' names, of a UNet and its text encoders or of Qwen-Image's transformer."""
    odd = next((key for key in state if not OURS.fullmatch(key)), None)
    other = next((key for key in state if key.startswith("transformer.")), None)
    if other is not None and not is_qwen_image(state):
        raise RequestError(
            f"kohya's format is written for UNets and Qwen-Image, and this LoRA is another transformer's ({other}). ComfyUI and diffusers read it "
            "as it is. ComfyUI does not read its alpha: where that is not the rank, set its strength to alpha / rank."
        )
    if odd is not None:
        if odd.startswith(("lora_unet_", "lora_te")):
            raise RequestError(f"these weights are in kohya's format already ({odd}).")
        raise RequestError(f"only LoRA weights of a UNet in diffusers' names (unet.*.lora_A.weight) can be converted; found {odd}.")
    names = {key.replace(".lora_B.", ".lora_A.") for key in state}
    lonely = next((key for key in sorted(names) for pair in (key, key.replace(".lora_A.", ".lora_B.")) if pair not in state), None)
    if lonely is not None:
        raise RequestError(f"one half of a pair of LoRA weights is missing: {lonely}.")
    if not names:
        raise RequestError("no LoRA weights there.")


def is_qwen_image(state: Mapping[str, Tensor]) -> bool:
    """By its feed-forward layers of image and prompt, which train by default: no other transformer calls them so."""
    return any(".img_mlp." in key or ".txt_mlp." in key for key in state)


def ranks_of(state: Mapping[str, Tensor]) -> list[int]:
    """All ranks in it, ascending. Raises RequestError for weights that are no LoRA in diffusers' names."""
    _check(state)
    return sorted({tensor.shape[0] for key, tensor in state.items() if ".lora_A." in key})


def text_width(state: Mapping[str, Tensor]) -> int | None:
    """The width of the text embeddings that cross-attention reads; None where the weights do not say."""
    widths = {tensor.shape[1] for key, tensor in state.items() if key.endswith(("attn2.to_k.lora_A.weight", "attn2.to_v.lora_A.weight"))}
    return widths.pop() if len(widths) == 1 else None


def metadata(state: Mapping[str, Tensor], name: str, alpha: float | None = None) -> dict[str, str]:
    """What the tools show of a file: the largest rank, alpha, the base's generation as far as the weights show it, and the file's name."""
    rank = ranks_of(state)[-1]
    shown_alpha = str(float(rank if alpha is None else alpha))
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": shown_alpha, "ss_output_name": name}
    generation = GENERATIONS.get(text_width(state))
    if generation:
        told |= {"ss_base_model_version": generation, "ss_v2": str(generation == "sd_v2")}
    architectures = {"sd_v1": ("stable-diffusion-v1", "512x512"), "sdxl_base_v1-0": ("stable-diffusion-xl-v1-base", "1024x1024")}
    if generation in architectures:  # of 2.x the specification wants to know whether it predicts v, which these weights do not say
        architecture, resolution = architectures[generation]
        told |= {
            "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": "diffusers",
            "modelspec.title": name, "modelspec.resolution": resolution,
        }  # fmt: skip
    return told
