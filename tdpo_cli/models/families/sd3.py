"""Stable Diffusion 3 and 3.5: a flow-matching transformer on 16-channel latents, two CLIP text encoders and T5, classifier-free guidance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.models import T5
from tdpo_cli.models.family import FlowFamily
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config, without_overflow
from tdpo_cli.models.zero_tokens import merge_zeros
from tdpo_cli.types import Conditioning


class StableDiffusion3(FlowFamily):
    # not `to_q` alone: the second attention of the dual blocks (attn2) stays as it is
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    t5_length = 256  # tokens, padded; behind CLIP's 77

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> StableDiffusion3:
        """Read the parts; T5 may be null in the folder, or left out by `model.drop_t5`. Raises RequestError."""
        absent, t5_dtype = T5 if model.drop_t5 else (), without_overflow(dtype)
        with _advice():
            pipeline = read_pipeline(source, model, dtype, "transformer", absent, texts_later=True, text_encoder_3=t5_dtype)
        if pipeline.tokenizer_3 is None and dtype == torch.float32:
            # half precision rounds the logarithm of the zeros' number
            merge_zeros(pipeline.transformer, pipeline.tokenizer_max_length)
        return cls(pipeline, read_scheduler_config(source, model.revision), device, model.resolution)

    def read_text_encoders(self) -> None:
        with _advice():
            super().read_text_encoders()

    @property
    def patch(self) -> int:
        return self.network.config.patch_size

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        config, size = self.network.config, self.network.config.sample_size
        height, width = (size, size) if resolution is None else grid_of(self.pipeline, resolution, self.patch)
        largest = config.pos_embed_max_size
        if max(height, width) > largest * self.patch:
            factor = self.pipeline.vae_scale_factor
            raise RequestError(
                f"model.resolution {height * factor} x {width * factor}: this model has positions for at most {largest * self.patch * factor} a side."
            )
        return (config.in_channels, height, width)

    @property
    def tokenizer(self):
        return self.pipeline.tokenizer if self.pipeline.tokenizer_3 is None else self.pipeline.tokenizer_3

    @property
    def prompt_limit(self) -> int:
        return self.pipeline.tokenizer_max_length if self.pipeline.tokenizer_3 is None else self.t5_length

    def unshifted(self, steps: int) -> None:
        """The pipeline gives its scheduler none."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """embeds: CLIP-L and CLIP-G side by side, 0 up to T5's width, then T5's tokens (0 without T5); pooled: both CLIPs'."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_length
        )
        return Conditioning({"embeds": embeds, "pooled": pooled})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """The velocity. The network is given the timestep in 0..1000."""
        network = self.network
        embeds, pooled = (texts.parts[name].to(network.dtype) for name in ("embeds", "pooled"))
        return network(x.to(network.dtype), timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Where a part of T5 is missing: how to do without."""
    try:
        yield
    except RequestError as error:
        if any(part in str(error) for part in T5):
            raise RequestError(f"{error} Or train without T5: --set model.drop_t5=true") from None
        raise
