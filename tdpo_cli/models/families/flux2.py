"""FLUX.2 klein: a flow-matching transformer on batch-normalised 128-channel latents, hidden layers of Qwen3, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from tdpo_cli.config.settings import Model
from tdpo_cli.models.family import FlowFamily, tokens_before_prompt
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config, without_overflow
from tdpo_cli.types import Conditioning


class Flux2Klein(FlowFamily):
    patch = 1  # noise is drawn with a token's 2 x 2 latents as channels
    side = 2  # of that square
    text_length = 512  # tokens with the chat template around the prompt, padded

    def __init__(self, pipeline: DiffusionPipeline, *arguments):
        super().__init__(pipeline, *arguments)
        if pipeline.config.is_distilled:
            self.guidance = "none"
        # in the single blocks the output layer has the name that is a list of layers in the double ones: each is named in full
        last = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(pipeline.transformer.config.num_single_layers)]
        self.lora_targets = (*FlowFamily.lora_targets, "to_qkv_mlp_proj", *last)

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> Flux2Klein:
        pipeline = read_pipeline(source, model, dtype, "transformer", texts_later=True, text_encoder=without_overflow(dtype))
        return cls(pipeline, read_scheduler_config(source, model.revision), device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        """As the noise is drawn: a channel for each latent of a token."""
        size = self.pipeline.default_sample_size
        height, width = (size, size) if resolution is None else grid_of(self.pipeline, resolution, self.side)
        return (self.network.config.in_channels, height // self.side, width // self.side)

    @property
    def prompt_limit(self) -> int:
        return self.text_length - tokens_before_prompt(self.tokenizer)

    def mu(self, steps: int) -> float | None:
        """Depends on the number of steps too."""
        return compute_empirical_mu(self.tokens, steps) if self.scheduler_config.get("use_dynamic_shifting") else None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """embeds: three hidden layers side by side. Padding takes part: the network has no mask."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.text_length)
        return Conditioning({"embeds": embeds})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """The velocity. The network is given a token per place, positions of four axes, and the timestep in 0..1."""
        network, embeds = self.network, texts.parts["embeds"]
        velocity = network(
            hidden_states=self.pipeline._pack_latents(x.to(network.dtype)),
            timestep=t.to(network.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=embeds.to(network.dtype),
            txt_ids=self.pipeline._prepare_text_ids(embeds).to(x.device),
            img_ids=self.pipeline._prepare_latent_ids(x).to(x.device),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(x.shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Undo the batch normalisation of the VAE's latents, which it has in place of scale and shift."""
        vae, shape = self.pipeline.vae, (1, -1, 1, 1)
        mean, variance = (part.float().view(shape) for part in (vae.bn.running_mean, vae.bn.running_var))
        own = latents.to(self.device, torch.float32) * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return self.finite(vae.decode(self.pipeline._unpatchify_latents(own).to(vae.dtype), return_dict=False)[0], latents)
