"""How a latent becomes the picture that the critic's encoder reads: by the model's VAE, as published, or by something cheaper.

`tiny` and `rgb` are not approximations that leave the result alone: the critic sees other pictures, so the run is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.transfer import send
from tdpo_cli.models import loading
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.sampling.generate import denoise, encode

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

FITTED = 16  # images that the projection is fitted on; each has as many equations as latent pixels


class View(nn.Module):
    """Latents [b,*latent_shape] -> images [b,3,H,W] float32 in [0,1]. Its state holds what a resumed run must not fit again."""


class Decoded(View):
    """The model's own VAE: the published view."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)


class Tiny(View):
    """An AutoencoderTiny, which has its own scale and shift."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def state_dict(self) -> dict[str, Tensor]:
        return {}  # read from its files

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = latents.float() / config.scaling_factor + config.shift_factor
        decoded = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()
        if not bool(decoded.isfinite().all()):  # quantised to grey levels, it would become a picture
            raise WorkError("model.tiny_vae decoded an image that is not finite. Use --set algorithm.critic_view=decode.")
        return (decoded / 2 + 0.5).clamp(0, 1)


class RGB(View):
    """A colour per latent pixel, a linear function of its channels, enlarged to the size that the VAE would make."""

    def __init__(self, weight: Tensor, bias: Tensor, enlarge: int):
        """weight [C,3], bias [3]"""
        super().__init__()
        self.enlarge = enlarge
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("bchw,cr->brhw", latents.float(), self.weight) + self.bias.view(3, 1, 1)
        height, width = latents.shape[-2:]
        size = height * self.enlarge, width * self.enlarge
        return F.interpolate(colours.clamp(0, 1), size, mode="bilinear", align_corners=False)


def make(policy: Policy, preset: Preset) -> View | None:
    """The view that the preset names; None for `rgb`, which is fitted. Raises RequestError."""
    kind = preset.algorithm.critic_view
    if kind == "decode":
        return Decoded(policy)
    if len(policy.latent_shape) != 3:
        raise RequestError(
            f"algorithm.critic_view {kind} is for latents of channels x height x width; this model's are {list(policy.latent_shape)}. "
            "Use --set algorithm.critic_view=decode."
        )
    return tiny(policy, preset) if kind == "tiny" else None


def tiny(policy: Policy, preset: Preset) -> Tiny:
    """Read model.tiny_vae. Raises RequestError if it is made for other latents."""
    from diffusers import AutoencoderTiny

    half = loading.DTYPES[preset.model.dtype] if policy.device.type != "cpu" else torch.float32
    vae = loading.named_vae(AutoencoderTiny, "model.tiny_vae", preset.model.tiny_vae, half)
    way_out = "Name one that was made for this model, or use --set algorithm.critic_view=decode."
    seen, given = vae.config.latent_channels, policy.latent_shape[0]
    if seen != given:
        raise RequestError(f"model.tiny_vae {preset.model.tiny_vae} decodes latents of {seen} channels; this model's have {given}. {way_out}")
    factor = vae.config.upsampling_scaling_factor ** (len(vae.config.num_decoder_blocks) - 1)
    own = policy.family.pipeline.vae_scale_factor
    if factor != own:
        raise RequestError(f"model.tiny_vae {preset.model.tiny_vae} enlarges latents {factor} times, this model's VAE {own} times. {way_out}")
    return Tiny(vae.requires_grad_(False).eval().to(policy.device))


def fitted_prompts(preset: Preset, prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts of the images that the projection is fitted on. -> [FITTED]"""
    return Randomness(preset.run.seed, "critic-view").prompts(0, range(FITTED), prompts)


@torch.no_grad()
def rgb(policy: Policy, preset: Preset, prompts: Sequence[str], plan: Plan) -> RGB:
    """Fit the projection on images of the policy as training starts: a function of the seed, so every process makes the same one.

    All processes call the network equally often, as one that is sharded needs.
    """
    randomness, shape = Randomness(preset.run.seed, "critic-view"), policy.latent_shape
    texts, rows = encode(policy, fitted_prompts(preset, prompts))
    latents, images, guidance = [], [], preset.rollout.guidance_scale
    for ids in torch.arange(FITTED).split(plan.sample_batch):
        x_T = send(randomness.initial_latents(0, ids, shape), policy.device)
        noise = lambda k, ids=ids: randomness.step_noise(0, k, ids, shape)
        for *_, x_0 in denoise(policy, texts, rows[ids.to(rows.device)], x_T, noise, guidance):  # noqa: B007 - the last one counts
            pass
        latents.append(x_0)
        images += [policy.decode(part) for part in x_0.split(plan.decode_chunk)]
    weight, bias = least_squares(torch.cat(latents), torch.cat(images))
    return RGB(weight.float().to(policy.device), bias.float().to(policy.device), images[0].shape[-1] // shape[-1])


def least_squares(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from a latent pixel's channels to the mean colour of its square of the image. -> weight [C,3], bias [3], float64

    latents [b,C,h,w], images [b,3,H,W] with H and W multiples of h and w.
    """
    colours = F.adaptive_avg_pool2d(images.double().cpu(), latents.shape[-2:])
    known = latents.double().cpu().movedim(1, -1).flatten(0, -2)
    known = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
    # gelsd: the smallest solution where channels depend on each other
    solution = torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, -2), driver="gelsd").solution
    return solution[:-1], solution[-1]
