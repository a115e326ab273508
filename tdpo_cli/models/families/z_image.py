"""Z-Image: a flow-matching transformer on 16-channel latents and prompts of their own lengths, Qwen3, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tdpo_cli.config.settings import Model
from tdpo_cli.models.family import FlowFamily, tokens_before_prompt
from tdpo_cli.models.loading import grid_of, read_pipeline, read_scheduler_config, without_overflow
from tdpo_cli.types import Conditioning


class ZImage(FlowFamily):
    """The pipeline's guidance scale is pos + g (pos - neg); here it is everybody's, g + 1, so that 1 is off."""

    patch = 2
    text_length = 512  # tokens with the chat template around the prompt

    @classmethod
    def load(cls, source: str, model: Model, dtype: torch.dtype, device: torch.device) -> ZImage:
        pipeline = read_pipeline(source, model, dtype, "transformer", texts_later=True, text_encoder=without_overflow(dtype))
        return cls(pipeline, read_scheduler_config(source, model.revision), device, model.resolution)

    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        """Without a resolution 1024 x 1024 pixels, as in the pipeline: no config says it."""
        return (self.network.config.in_channels, *grid_of(self.pipeline, resolution or (1024, 1024), self.patch))

    @property
    def prompt_limit(self) -> int:
        return self.text_length - tokens_before_prompt(self.tokenizer)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """embeds [b,L,D] and mask [b,L]: each prompt at its own length, zeros behind it."""
        # a new list: the pipeline writes its chat template into the one that it is given
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        full = [row.new_ones(len(row), dtype=torch.bool) for row in rows]
        return Conditioning({"embeds": pad_sequence(rows, batch_first=True), "mask": pad_sequence(full, batch_first=True)})

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """The velocity, whose negative the network gives. It is given lists of one-frame latents and of prompts, and time from 0 up to 1."""
        network, lengths = self.network, texts.parts["mask"].sum(1).tolist()
        captions = [row[:length] for row, length in zip(texts.parts["embeds"].to(network.dtype), lengths, strict=True)]
        frames = list(x.to(network.dtype).unsqueeze(2))
        velocities = network(frames, (1000 - t) / 1000, captions, return_dict=False)[0]
        return -torch.stack(list(velocities)).squeeze(2).float()
