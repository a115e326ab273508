"""The critic: a five-layer MLP that reads the return of a denoising step off the embedding of its half-made image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT = (0.2, 0.2, 0.1)  # behind the first three layers
ACTIVATIONS = {"none": nn.Identity(), "relu": nn.ReLU()}


class Critic(nn.Module):
    """E -> 1024 -> 128 -> 64 -> 16 -> 1, as published without activation functions; always fp32.

    Dropout comes as given keep masks, so that replicas of the critic stay identical; without masks there is none.
    """

    def __init__(self, embed_dim: int, init_std: float | None = None, activation: str = "none", beside: int = 0):
        """beside: numbers that the first layer reads beside an embedding of width E."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.embed_dim = embed_dim
        self.init_std = init_std if init_std is not None else 1 / (embed_dim + 1)  # also of reset neurons
        sizes = (embed_dim + beside, *WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(WIDTHS)))

    def initialise(self, generator: torch.Generator) -> None:
        """All weights ~ N(0, init_std^2), biases 0."""
        for layer in self.layers:
            layer.weight.data.copy_(torch.empty(layer.weight.shape).normal_(0, self.init_std, generator=generator))
            layer.bias.data.zero_()

    def forward(self, embeds: Tensor, keep_masks: Sequence[Tensor] | None = None) -> Tensor:
        """embeds [b,E + beside], keep_masks three of [b,width] (bool) -> values [b]"""
        return self.outputs(embeds, keep_masks)[-1].squeeze(-1)

    def outputs(self, embeds: Tensor, keep_masks: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The output of every Linear, before activation and dropout. -> five of [b,width]"""
        x, outputs = embeds.float(), []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            outputs.append(x)
            x = self.activation(x)
            if keep_masks is not None and i < len(DROPOUT):
                x = x * keep_masks[i].to(x) / (1 - DROPOUT[i])
        return outputs
