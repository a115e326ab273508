"""Stand one token for the many zeros that SD 3 appends where it has no T5.

Without T5 diffusers' StableDiffusion3Pipeline appends 256 tokens of zeros to those of CLIP. They carry no position and pass
through the same weights, so they stay equal to each other in every layer: one token says the same if attention counts it 256
times, which is log 256 added to its logits. Exact up to rounding, for gradients and adapters too, and several times faster
where a picture has few tokens of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CountedLast:
    """Attention over picture and text together, as diffusers' JointAttnProcessor2_0, in which the last token counts `count` times."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        heads = lambda x, norm: _normed(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2), norm)
        picture, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(picture), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        key = torch.cat([heads(attn.to_k(picture), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        value = torch.cat([heads(attn.to_v(picture), None), heads(attn.add_v_proj(text), None)], dim=2)
        bias = None
        if self.count > 1:
            bias = query.new_zeros(1, 1, 1, key.shape[2])
            bias[..., -1] = math.log(self.count)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        of_picture, of_text = attended.split([picture.shape[1], text.shape[1]], dim=1)
        for layer in attn.to_out:
            of_picture = layer(of_picture)
        return of_picture, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def merge_zeros(transformer: nn.Module, text_tokens: int) -> None:
    """Make an SD3Transformer2DModel take what follows its first `text_tokens` tokens of text, all zeros, as one token."""
    attention = CountedLast()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(attention)

    def shorten(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = named["encoder_hidden_states"]
        attention.count = states.shape[1] - text_tokens
        if attention.count > 1:
            named = {**named, "encoder_hidden_states": states[:, : text_tokens + 1]}
        return arguments, named

    transformer.register_forward_pre_hook(shorten, with_kwargs=True)
