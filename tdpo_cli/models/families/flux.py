"""FLUX.1: a flow-matching transformer on packed 16-channel latents, CLIP's pooled vector and T5; guidance embedded, or classifier-free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tdpo_cli.config.settings import Model
from tdpo_cli.models.family import FlowFamily
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config, without_overflow
from tdpo_cli.types import Conditioning


class Flux(FlowFamily):
    # attention of both kinds of block; the feed-forward layers of the double blocks
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    patch = 2
    t5_length = 512  # tokens, padded

    def __init__(self, pipeline: DiffusionPipeline, *arguments):
        super().__init__(pipeline, *arguments)
        # without the embedding (schnell, and models made from it) the scale would be ignored in silence
        self.guidance = "embedded" if pipeline.transformer.config.guidance_embeds else "cfg"

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> Flux:
        pipeline = read_pipeline(source, model, dtype, "transformer", texts_later=True, text_encoder_2=without_overflow(dtype))
        return cls(pipeline, read_scheduler_config(source, model.revision), device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        """As the noise is drawn: unpacked."""
        size = self.pipeline.default_sample_size
        grid = (size, size) if resolution is None else grid_of(self.pipeline, resolution, self.patch)
        return (self.network.config.in_channels // self.patch**2, *grid)

    @property
    def tokenizer(self):
        return self.pipeline.tokenizer_2

    @property
    def prompt_limit(self) -> int:
        return self.t5_length

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.t5_length)
        return Conditioning({"embeds": embeds, "pooled": pooled})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """The velocity. The network is given packed latents, positions, the timestep in 0..1 and the plain guidance scale."""
        network, (height, width) = self.network, x.shape[-2:]
        embeds, pooled = (texts.parts[name].to(network.dtype) for name in ("embeds", "pooled"))
        velocity = network(
            hidden_states=self.pack(x.to(network.dtype)),
            timestep=t.to(network.dtype) / 1000,
            guidance=torch.full_like(t, guidance) if self.guidance == "embedded" else None,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, network.dtype),
            return_dict=False,
        )[0]
        return self.unpack(velocity, height, width)

    def pack(self, latents: Tensor) -> Tensor:
        """[b,C,h,w] -> [b,(h/2)(w/2),4C]: a token is a square of 2 x 2, ordered channel, row, column."""
        b, channels, height, width = latents.shape
        return self.pipeline._pack_latents(latents, b, channels, height, width)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[b,(h/2)(w/2),4C] -> [b,C,h,w]"""
        return self.pipeline._unpack_latents(tokens, height, width, 1)
