"""The processes that share a run: who does what, and the few things they exchange. Beside the trackers, the only user of accelerate."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import LostPeer, RequestError, WorkError, first_line
from tdpo_cli.machine import launch


class World:
    """One process among `size`. With one process nothing is exchanged and accelerate is not imported."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", local_rank: int = 0, cpu_group: Any = None):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.local_rank = local_rank  # on this machine
        self.cpu_group = cpu_group  # for what is exchanged from CPU memory; None: the default group does that too

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

    def ranks(self, count: int) -> Tensor:
        """The process whose share each of `count` things is in. -> [count] int64"""
        bounds = torch.tensor([count * (rank + 1) // self.size for rank in range(self.size)])
        return torch.searchsorted(bounds, torch.arange(count), right=True)

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """One process of each machine goes through before the others: what it downloads lies in the cache for them."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    # --- exchanges ------------------------------------------------------------------------------------------------------
    def gather(self, columns: dict[str, Tensor], home: Tensor) -> dict[str, Tensor]:
        """Every process' rows of each column, on every process: [B,...] -> [N,...] in CPU memory, in one exchange.

        home [N]: the process that each row comes from; a process gives its rows in their order in `home`. Alone: as they are.
        """
        if self.size == 1:
            return columns
        columns = {name: column.cpu().contiguous() for name, column in columns.items()}
        packed = [column.reshape(len(column), -1).view(torch.uint8) for column in columns.values()]
        widths, counts = [part.shape[1] for part in packed], home.bincount(minlength=self.size).tolist()
        mine = torch.zeros(max(counts), sum(widths), dtype=torch.uint8)  # padded: all must be of one size
        mine[: counts[self.rank]] = torch.cat(packed, dim=1)
        everyone = torch.empty(self.size, *mine.shape, dtype=torch.uint8)
        with _exchange("trajectories"):
            torch.distributed.all_gather(list(everyone.unbind(0)), mine, group=self.cpu_group)
        arrived = home.argsort(stable=True).argsort()  # rows lie process by process: where each of the N is among them
        whole, offset = {}, 0
        for (name, column), width in zip(columns.items(), widths, strict=True):
            rows = torch.cat([everyone[rank, :count, offset : offset + width] for rank, count in enumerate(counts)])
            whole[name] = rows.view(column.dtype).view(-1, *column.shape[1:])[arrived]
            offset += width
        return whole

    def exchange(self, tensor: Tensor, outgoing: dict[int, Tensor], incoming: dict[int, int]) -> Tensor:
        """Send rows of a tensor straight to the processes that need them. -> the rows that arrive, by rank, in CPU memory

        outgoing: rank -> the rows it gets, incoming: rank -> how many come from it. Both sides know both, so nothing is agreed on first.
        One process at a time: beside the tensor itself there is never more than one other process' part of it.
        """
        ranks = sorted(incoming)
        arrived = torch.empty(sum(incoming.values()), *tensor.shape[1:], dtype=tensor.dtype)
        room = dict(zip(ranks, arrived.split([incoming[rank] for rank in ranks]), strict=True))
        with _exchange("latents"):
            for distance in range(1, self.size):
                to, source, waiting = (self.rank + distance) % self.size, (self.rank - distance) % self.size, []
                if len(outgoing[to]):
                    part = tensor[outgoing[to].to(tensor.device)].cpu().contiguous()
                    waiting.append(torch.distributed.isend(part, to, group=self.cpu_group))
                if incoming[source]:
                    waiting.append(torch.distributed.irecv(room[source], source, group=self.cpu_group))
                for work in waiting:
                    work.wait()
        return arrived

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """One flat all-reduce of the gradients, in place."""
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        with _exchange("gradients"):
            torch.distributed.all_reduce(flat)
            for parameter, summed in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
                parameter.grad.copy_(summed.view_as(parameter))

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "SUM")

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MAX")

    def min(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "MIN")

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """In place where several processes are."""
        if self.size > 1:
            group = self.cpu_group if tensor.device.type == "cpu" else None
            with _exchange("metrics"):
                torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, operation), group=group)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process' value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with _exchange("the main process' state"):
            torch.distributed.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            with _exchange("a barrier"):
                torch.distributed.barrier(group=self.cpu_group)

    def close(self) -> None:
        """At the end of the work: wait for everyone, then let go."""
        if self.size > 1:
            self.barrier()
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _exchange(what: str) -> Iterator[None]:
    """A process that is gone, or silent for too long, as one clear message. Raises LostPeer."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)[:200]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise WorkError(
                f"another program uses {place}, where the processes meet. Run the same command again; where you start the processes yourself, "
                "set MASTER_PORT (torchrun: --master-port) to a port that is free."
            ) from error
        raise LostPeer(
            f"lost another process of the run while exchanging {what}: it ended, or said nothing for {launch.patience():g} minutes "
            f"(TDPO_TIMEOUT sets how long to wait). Its own message tells why; the last finished epoch is safe on disk. [{reason}]"
        ) from error


def current(device: str | None = None) -> World:
    """The world this process was started in: alone, or as one of several workers. `device`: cpu or cuda, default what is there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return World(device=device or best_device())
    from accelerate import PartialState

    # without `cpu` on a machine without a GPU accelerate makes a world of one and says nothing
    cpu = (device or best_device()) == "cpu"
    timeout = datetime.timedelta(minutes=launch.patience())
    with _exchange("the first greetings"):
        state = PartialState(cpu=cpu, timeout=timeout)
        group = None if cpu else torch.distributed.new_group(backend="gloo", timeout=timeout)
    if state.num_processes != size:
        raise WorkError(f"{size} processes were asked for (WORLD_SIZE), but accelerate made a world of {state.num_processes}.")
    return World(state.process_index, state.num_processes, state.device, state.local_process_index, group)


def may_download() -> bool:
    """Whether the model hub may be asked at all."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("1", "on", "yes", "true")


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
