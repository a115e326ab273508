"""How each diffusers pipeline is called, so that it does what the product does: one line per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def as_drawn(pipeline: Any, latents: Tensor) -> Tensor:
    """The pipeline takes latents in the space that noise is drawn in."""
    return latents


def packed(pipeline: Any, latents: Tensor) -> Tensor:
    """The pipeline takes 2 x 2 latents as one token."""
    channels, height, width = latents.shape[-3:]
    return pipeline._pack_latents(latents, len(latents), channels, height, width)


@dataclass(frozen=True)
class Call:
    """Arguments of one class's `__call__`. `guided` and `offset` are of classifier-free guidance: scale s is given as s + offset."""

    tiny: str  # its name in make_tiny
    guided: str = "guidance_scale"  # the argument of classifier-free guidance
    offset: float = 0.0
    negative: str | None = None  # how the empty negative prompt is asked for; None is the class's own default
    takes_negative: bool = True
    latents: Callable[[Any, Tensor], Tensor] = as_drawn
    default_size: bool = False  # without height and width it draws the size that its config says, not a fixed one

    def arguments(self, kind: str, guidance: float, negative: str | None, count: int) -> dict[str, Any]:
        """Guidance and negative prompt. `kind` is `Family.guidance`: cfg, embedded or none."""
        if kind != "cfg":
            return {"guidance_scale": guidance}
        chosen = self.negative if negative is None else negative
        return {self.guided: max(guidance, 1) + self.offset, **({} if chosen is None else {"negative_prompt": [chosen] * count})}


CALLS = {
    "StableDiffusionPipeline": Call("sd1", default_size=True),
    # an absent negative prompt is zeros or the encoded "", as the folder's force_zeros_for_empty_prompt says
    "StableDiffusionXLPipeline": Call("sdxl", default_size=True),
    "StableDiffusion3Pipeline": Call("sd3", default_size=True),
    # without a negative prompt there would be no guidance
    "FluxPipeline": Call("flux", guided="true_cfg_scale", negative="", latents=packed),
    "Flux2KleinPipeline": Call("flux2-klein", takes_negative=False),
    "ZImagePipeline": Call("z-image", offset=-1.0),  # conditional + g (conditional - unconditional)
    "QwenImagePipeline": Call("qwen-image", guided="true_cfg_scale", negative="", latents=packed),
}


def images(
    pipeline: Any, call: Call, prompts: Sequence[str], size: tuple[int, int], steps: int, latents: Tensor | None = None, **arguments: Any
) -> Tensor:
    """The pipeline's own images, from that noise or from the generator in `arguments`. -> [b,3,H,W] in [0,1]"""
    noise = {} if latents is None else {"latents": call.latents(pipeline, latents.clone())}
    # a list of its own: Z-Image writes its chat template into the list it is given
    taken = {"prompt": list(prompts), "height": size[0], "width": size[1], "num_inference_steps": steps, "output_type": "pt"}
    return pipeline(**taken, **noise, **arguments).images.float()
