"""Move tensors between main memory and the device without making the device wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`. From main memory to a GPU through pinned memory, so that the CPU goes on at once."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def room(shape: Sequence[int], device: torch.device, offload: bool) -> Tensor:
    """An unfilled fp32 tensor: on the device, or in main memory (pinned beside a GPU) if it is to be offloaded."""
    waits = offload and device.type == "cuda"
    return torch.empty(*shape, device="cpu" if waits else device, pin_memory=waits)


def rows(tensor: Tensor, *index: Tensor) -> tuple[Tensor, ...]:
    """Index tensors on the device of the tensor that they index."""
    return tuple(send(part, tensor.device) for part in index)
