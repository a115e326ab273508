"""Stable Diffusion 1.x and 2.x: a UNet on 4-channel latents, one CLIP text encoder, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.models.family import Family
from tdpo_cli.models.loading import component, grid_of, read_scheduler_config, trained_network
from tdpo_cli.models.loading import vae as read_vae
from tdpo_cli.types import Conditioning


class StableDiffusion(Family):
    component = "unet"

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
        """Read the networks one by one, so that each missing part is named. Raises RequestError."""
        part = lambda kind, folder, **options: component(kind, source, folder, model.revision, **options)
        text_encoder = part(CLIPTextModel, "text_encoder", torch_dtype=dtype)
        tokenizer = part(CLIPTokenizer, "tokenizer")
        vae = read_vae(AutoencoderKL, source, model, dtype)
        unet = trained_network(UNet2DConditionModel, source, "unet", model, dtype)
        # any other offset is made 1, as diffusers' pipeline does, through which the official code loads
        scheduler_config = {**read_scheduler_config(source, model.revision), "steps_offset": 1}
        must_fit(source, unet, vae, text_encoder, tokenizer)
        # the UNet comes last: the pipeline's constructor would change the sample_size of old ones
        scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
        pipeline = StableDiffusionPipeline(vae, text_encoder, tokenizer, None, scheduler, None, None, requires_safety_checker=False)
        pipeline.register_modules(unet=unet)
        return cls(pipeline, scheduler_config, device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        unet = self.network
        return (unet.config.in_channels, *(latent_size(unet) if resolution is None else grid_of(self.pipeline, resolution)))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return Conditioning({"embeds": embeds})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        unet = self.network
        return unet(x.to(unet.dtype), t, encoder_hidden_states=texts.parts["embeds"].to(unet.dtype), return_dict=False)[0]

    def normal_form(self, prompt: str) -> str:
        """As the official code decodes it: with the padding, which is not a special token in Stable Diffusion 2."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer([prompt], padding="max_length", max_length=self.prompt_limit, truncation=True).input_ids[0]
        return tokenizer.decode(ids, skip_special_tokens=True)


def must_fit(source: str, unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """The parts belong together, and the UNet is one that takes latents and a prompt only. Raises RequestError."""
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise RequestError(
            f"{source}: its UNet takes {channels} channels and its VAE makes {latent}: a model for inpainting, upscaling or editing. "
            "Only text-to-image models can be trained."
        )
    seen, given = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if seen != given:
        raise RequestError(f"{source}: its UNet reads prompts {seen} wide and its text encoder makes them {given} wide: parts of different models.")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise RequestError(
            f"{source}: its tokenizer knows {len(tokenizer)} tokens and its text encoder {text_encoder.config.vocab_size}: parts of different models."
        )


def latent_size(unet: nn.Module) -> tuple[int, int]:
    size = unet.config.sample_size
    if size is None:
        raise RequestError("the UNet's config.json does not say sample_size, the side of a latent (64 for 512 pixels).")
    height, width = (size, size) if isinstance(size, int) else size
    # the first Stable Diffusion uploads said 32 and meant 64; diffusers' own pipeline repairs them in the same way
    if size == 32 and _version(unet.config.get("_diffusers_version", "9")) < (0, 9):
        height = width = 64
    return height, width


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
