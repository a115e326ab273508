"""What a replay compares, for traces of every kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Comparison:
    """One recorded tensor beside ours."""

    name: str  # the trace's name, with epoch and inner epoch
    ours: Tensor
    recorded: Tensor
    tolerance: float  # largest absolute difference; for `relative`, in units of the largest recorded magnitude
    relative: bool = False
    elementwise: bool = False  # in units of each element's own magnitude, at least 1

    def error(self, recorded: Tensor | None = None) -> float:
        """Largest difference in units of the scale, NaN counting as infinite."""
        recorded = (self.recorded if recorded is None else recorded).double()
        if not recorded.numel():
            return 0.0
        ours, known = self.ours.detach().double().reshape(recorded.shape), self.recorded.double().abs()
        scale = known.clamp(min=1) if self.elementwise else max(known.max().item(), 1e-30) if self.relative else 1.0
        return torch.nan_to_num((ours - recorded).abs() / scale, nan=float("inf")).max().item()

    def holds(self, recorded: Tensor | None = None) -> bool:
        return self.error(recorded) <= self.tolerance
