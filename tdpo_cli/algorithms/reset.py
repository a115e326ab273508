"""Which neurons of the critic are dormant, and re-initialising a chosen set of them (TDPO-R; ReDo, Sokar et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdpo_cli.algorithms.critic import Critic

TARGETS = {
    "active": lambda dormant: ~dormant,  # TDPO-R: against primacy bias
    "dormant": lambda dormant: dormant,  # ReDo: against lost capacity
    "all": lambda dormant: torch.ones_like(dormant),
    "none": lambda dormant: torch.zeros_like(dormant),
}


@dataclass
class Census:
    """One count of the hidden neurons of a critic."""

    activations: list[Tensor]  # per hidden layer [rows,width], relu of the Linear's output
    scores: list[Tensor]  # per hidden layer [width]: mean activation over rows / mean of that over the layer
    dormant: list[Tensor]  # per hidden layer [width] bool
    overlap: float | None = None  # |dormant before and now| / min of the two counts
    total: int = field(init=False)
    dormant_count: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(mask.numel() for mask in self.dormant)
        self.dormant_count = int(sum(mask.sum() for mask in self.dormant))

    def dormant_at(self, threshold: float) -> int:
        return int(sum((score <= threshold).sum() for score in self.scores))


@torch.no_grad()
def census(critic: Critic, embeds: Tensor, threshold: float, before: Sequence[Tensor] | None = None) -> Census:
    """Normalised activations (Sokar et al. 2023, eq. 1) of the four hidden layers on embeds [rows,E], without dropout.

    The layers are linear, so about half of the neurons count as dormant from the start.
    """
    activations = [output.relu() for output in critic.outputs(embeds)[:-1]]
    means = [activation.mean(dim=0) for activation in activations]
    scores = [mean / (mean.mean() + 1e-9) for mean in means]
    dormant = [score <= threshold for score in scores]
    return Census(activations, scores, dormant, None if before is None else _overlap(before, dormant))


def _overlap(before: Sequence[Tensor], now: Sequence[Tensor]) -> float | None:
    both = int(sum((a.to(b.device) & b).sum() for a, b in zip(before, now, strict=True)))
    smaller = min(int(sum(mask.sum() for mask in before)), int(sum(mask.sum() for mask in now)))
    return both / smaller if smaller else None


@torch.no_grad()
def reinitialise(critic: Critic, optimizer: torch.optim.Optimizer, chosen: Sequence[Tensor], generator: torch.Generator) -> int:
    """Make the chosen hidden neurons new: their incoming rows, bias and outgoing columns, and Adam's moments of exactly these.

    Draws are N(0, init_std^2) on the CPU in fp32, layer by layer: rows, then the next layer's columns. Adam's step counters
    and the last layer's bias stay. chosen: per hidden layer [width] bool. -> number of neurons
    """
    for layer, following, mask in zip(critic.layers[:-1], critic.layers[1:], chosen, strict=True):
        mask = mask.to(layer.weight.device)
        count = int(mask.sum())
        if count == 0:
            continue
        rows = torch.empty(count, layer.in_features).normal_(0, critic.init_std, generator=generator)
        columns = torch.empty(following.out_features, count).normal_(0, critic.init_std, generator=generator)
        layer.weight[mask] = rows.to(layer.weight)
        layer.bias[mask] = 0
        following.weight[:, mask] = columns.to(layer.weight)
        for moment in ("exp_avg", "exp_avg_sq"):
            _zero(optimizer, layer.weight, moment, (mask,))
            _zero(optimizer, layer.bias, moment, (mask,))
            _zero(optimizer, following.weight, moment, (slice(None), mask))
    return int(sum(mask.sum() for mask in chosen))


def _zero(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moment: str, where: tuple) -> None:
    state = optimizer.state.get(parameter)
    if state and moment in state:
        state[moment][where] = 0
