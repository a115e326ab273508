"""The processes that share a run: who does what, and the few things they exchange. The only user of accelerate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import RequestError
from tdpo_cli.types import Trajectory


class World:
    """One process among `size`. With one process nothing is exchanged and accelerate is not imported."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # --- who does what --------------------------------------------------------------------------------------------------
    def mine(self, count: int) -> list[int]:
        """The sample ids this process makes, of 0 .. count-1."""
        return list(range(count))[self.share(count)]

    def share(self, count: int) -> slice:
        """This process' contiguous part of `count` things, as even as can be."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    # --- exchanges ------------------------------------------------------------------------------------------------------
    def gather(self, trajectory: Trajectory, scores: dict[str, Tensor]) -> tuple[Trajectory, dict[str, Tensor]]:
        """Everyone's samples and scores, ordered by sample id, on every process."""
        if self.size == 1:
            return trajectory, scores
        from accelerate.utils import gather_object

        parts = gather_object([(_to_cpu(trajectory), {name: score.cpu() for name, score in scores.items()})])
        trajectories, all_scores = zip(*parts, strict=True)
        return _joined(trajectories), {name: torch.cat([s[name] for s in all_scores]) for name in scores}

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """One flat all-reduce of the gradients, in place."""
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        torch.distributed.all_reduce(flat)
        offset = 0
        for parameter in parameters:
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def current(device: str | None = None) -> World:
    """The world this process was started in: alone, or as one of accelerate's workers."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=device or best_device())
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return World(state.process_index, state.num_processes, state.device)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(name: str | None) -> torch.device:
    """The device called `name`, or the best one. Raises RequestError where this machine does not have it."""
    try:
        wanted = torch.device(name or best_device())
    except RuntimeError:
        raise RequestError(f"--device {name}: not a device; expected cpu, cuda, cuda:1, ...") from None
    if wanted.type == "cuda" and (not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count()):
        raise RequestError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return wanted


def _to_cpu(trajectory: Trajectory) -> Trajectory:
    moved = {name: value.cpu() for name, value in _fields(trajectory).items() if isinstance(value, Tensor)}
    return dataclasses.replace(trajectory, **moved)


def _joined(parts: Iterable[Trajectory]) -> Trajectory:
    """Parts in rank order hold contiguous sample ids, so joining them keeps the order."""
    parts = list(parts)
    whole: dict[str, Any] = {}
    for name, value in _fields(parts[0]).items():
        columns = [getattr(part, name) for part in parts]
        if name == "timesteps" or not isinstance(value, (Tensor, tuple)):
            whole[name] = value
        else:
            whole[name] = torch.cat(columns) if isinstance(value, Tensor) else sum(columns, ())
    return Trajectory(**whole)


def _fields(trajectory: Trajectory) -> dict[str, Any]:
    return {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)}
