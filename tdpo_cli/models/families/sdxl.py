"""Stable Diffusion XL: a UNet with size conditions, two CLIP text encoders, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.models.families.sd import latent_size
from tdpo_cli.models.family import Family
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config
from tdpo_cli.types import Conditioning

# their networks predict something else than a DDPM's, so their configs say nothing that DDIM could use
OTHER_DIFFUSIONS = ("EDM", "FlowMatch", "LCM", "TCD")


class StableDiffusionXL(Family):
    component = "unet"

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> StableDiffusionXL:
        """Read all parts; the VAE computes in fp32 where fp16 is known to overflow. Raises RequestError."""
        content = models.index(source, model.revision)
        if content.get("requires_aesthetics_score") or content.get("text_encoder", [None, None])[-1] is None:
            raise RequestError(f"{source}: an SDXL refiner, which continues another model's image. Give the base model: it makes images from text.")
        config = as_ddim(source, read_scheduler_config(source, model.revision))
        half = dtype == torch.float16
        pipeline = read_pipeline(source, model, dtype, "unet", vae=torch.float32 if half else dtype)
        must_fit(source, pipeline)
        if half and not pipeline.vae.config.force_upcast:
            pipeline.vae.half()
        pipeline.scheduler = DDIMScheduler.from_config(config)
        return cls(pipeline, config, device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        unet = self.network
        return (unet.config.in_channels, *(latent_size(unet) if resolution is None else grid_of(self.pipeline, resolution)))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        # the size before cropping, the corner of the crop and the size after: an image that was never cropped
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)
        return Conditioning({"embeds": embeds, "pooled": pooled, "time_ids": sizes.repeat(len(prompts), 1)})

    def encode_negative(self, prompt: str) -> Conditioning:
        """An empty prompt is zeros where the pipeline makes it so, and a prompt like any other elsewhere."""
        row = self.encode([prompt])
        if prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return row
        return Conditioning({name: part if name == "time_ids" else torch.zeros_like(part) for name, part in row.parts.items()})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        unet, parts = self.network, texts.parts
        added = {"text_embeds": parts["pooled"].to(unet.dtype), "time_ids": parts["time_ids"]}
        embeds = parts["embeds"].to(unet.dtype)
        return unet(x.to(unet.dtype), t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def as_ddim(source: str, config: dict) -> dict:
    """The scheduler's config with DDIM's own keys filled in; spacing, offset and prediction type stay. Raises RequestError."""
    name = str(config.get("_class_name"))
    if name.startswith(OTHER_DIFFUSIONS):
        raise RequestError(f"{source}: its scheduler is {name}. Only SDXL models that DDIM can sample are supported.")
    if not name.startswith(("DDIM", "DDPM")):  # the others have no such key and never clip
        config = {"clip_sample": False, **config}
    # the last step goes to the first training timestep, as the Sampler's does
    return {**config, "set_alpha_to_one": False}


def must_fit(source: str, pipeline: StableDiffusionXLPipeline) -> None:
    """The parts belong together, and the UNet takes latents, a prompt and six sizes only. Raises RequestError."""
    unet, first, second = pipeline.unet.config, pipeline.text_encoder.config, pipeline.text_encoder_2.config
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise RequestError(
            f"{source}: its UNet takes {unet.in_channels} channels and its VAE makes {pipeline.vae.config.latent_channels}: a model for inpainting, "
            "upscaling or editing, or a VAE of another model. Only text-to-image models can be used."
        )
    if unet.time_cond_proj_dim is not None:
        raise RequestError(f"{source}: its UNet reads the guidance scale, a distilled model (LCM). Give the model that it was made from.")
    given = first.hidden_size + second.hidden_size, second.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    seen = unet.cross_attention_dim, unet.projection_class_embeddings_input_dim
    if seen != given:
        raise RequestError(
            f"{source}: its UNet reads conditions {seen} wide and its text encoders make them {given} wide: parts of different models."
        )
