"""Qwen-Image: a flow-matching transformer on packed 16-channel latents of a video VAE, Qwen2.5-VL, rescaled classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo_cli.config.settings import Model
from tdpo_cli.models.family import FlowFamily
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config, without_overflow
from tdpo_cli.types import Conditioning


class QwenImage(FlowFamily):
    # attention and feed-forward layers of image and prompt, as published for Flow-GRPO
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    patch = 2
    prompt_limit = 1024  # tokens behind the start of the pipeline's template, which it drops

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> QwenImage:
        pipeline = read_pipeline(source, model, dtype, "transformer", texts_later=True, text_encoder=without_overflow(dtype))
        return cls(pipeline, read_scheduler_config(source, model.revision), device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        """As the noise is drawn: unpacked, without the frame."""
        size = self.pipeline.default_sample_size
        grid = (size, size) if resolution is None else grid_of(self.pipeline, resolution, self.patch)
        return (self.network.config.in_channels // self.patch**2, *grid)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """embeds [b,L,D] and mask [b,L], padded to the longest prompt."""
        embeds, mask = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.prompt_limit)
        if mask is None:  # all prompts are equally long
            mask = embeds.new_ones(embeds.shape[:2])
        return Conditioning({"embeds": embeds, "mask": mask.bool()})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """The velocity. The network is given packed latents, their shape as one frame, and the timestep in 0..1."""
        network, (height, width) = self.network, x.shape[-2:]
        velocity = network(
            hidden_states=self.pack(x.to(network.dtype)),
            timestep=t.to(network.dtype) / 1000,
            encoder_hidden_states=texts.parts["embeds"].to(network.dtype),
            encoder_hidden_states_mask=texts.parts["mask"],
            img_shapes=[[(1, height // self.patch, width // self.patch)]] * len(x),
            return_dict=False,
        )[0]
        return self.unpack(velocity, height, width)

    def combine(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Guidance that keeps the length of the conditional prediction, token by token."""
        guided, plain = (self.pack(one) for one in (super().combine(unconditional, conditional, guidance), conditional))
        length = lambda tokens: tokens.norm(dim=-1, keepdim=True)
        return self.unpack(guided * (length(plain) / length(guided)), *conditional.shape[-2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Through the VAE of videos as one frame; its latents have a mean and a deviation per channel."""
        vae = self.pipeline.vae
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
        own = latents.to(self.device, torch.float32) * std + mean
        return self.finite(vae.decode(own.unsqueeze(2).to(vae.dtype), return_dict=False)[0][:, :, 0], latents)

    def pack(self, latents: Tensor) -> Tensor:
        """[b,C,h,w] -> [b,(h/2)(w/2),4C]: a token is a square of 2 x 2, ordered channel, row, column."""
        b, channels, height, width = latents.shape
        return self.pipeline._pack_latents(latents, b, channels, height, width)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[b,(h/2)(w/2),4C] -> [b,C,h,w]"""
        return self.pipeline._unpack_latents(tokens, height, width, 1).squeeze(2)
