"""Shard the frozen denoising network over the processes of a run (FSDP2), where one card does not hold it.

Every process keeps 1/n of each block's weights and gathers a block while it computes with it. Adapters stay whole on every
process: their gradients are summed as in an unsharded run, and checkpoints are the plain ones. Text encoders are not sharded:
they compute once per epoch and wait in main memory otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from tdpo_cli.config.settings import Preset
from tdpo_cli.console import size
from tdpo_cli.errors import RequestError
from tdpo_cli.machine.world import World

SHARE = 0.5  # of a card's memory: shard = "auto" shards a network whose weights are more than that


def of(preset: Preset, world: World) -> Callable[[nn.Module], bool] | None:
    """A function that shards a network where the preset asks for it and returns whether it did; None where it never will.

    Raises RequestError for a preset that cannot be sharded.
    """
    if preset.run.shard == "on":
        check(preset, world)
    if world.size == 1 or preset.run.shard == "off" or (preset.run.shard == "auto" and world.device.type != "cuda"):
        return None

    def distribute(network: nn.Module) -> bool:
        if preset.run.shard == "auto":
            weights, card = weight_bytes(network), torch.cuda.mem_get_info(world.device)[1]
            if weights <= SHARE * card:
                return False
            check(preset, world, f"its denoising network ({size(weights)}) is too large for one card of {size(card)}, so it is sharded")
        shard(network, world)
        return True

    return distribute


def check(preset: Preset, world: World, why: str = 'run.shard is "on"') -> None:
    """Every process must call the network equally often: it gathers its blocks from all. Raises RequestError."""
    samples, batch = preset.rollout.samples_per_epoch, preset.update.batch_size
    if world.size == 1:
        raise RequestError(f"{why}: sharding needs several processes. Start with --gpus N, or --set run.shard=off.")
    if preset.model.lora_rank == 0:
        raise RequestError(f"{why}: only a frozen network can be sharded. Train a LoRA (model.lora_rank above 0), or use run.shard=off.")
    if preset.model.quantise is not None:
        raise RequestError(f"{why}: packed weights (model.quantise {preset.model.quantise}) cannot be split. Use run.shard=off.")
    if samples % world.size or batch % world.size:
        raise RequestError(
            f"{why}: rollout.samples_per_epoch {samples} and update.batch_size {batch} must be multiples of the {world.size} processes."
        )
    if preset.run.compile:
        raise RequestError(f"{why}: run.compile was not tested with it. Use --set run.compile=false.")


def shard(network: nn.Module, world: World) -> None:
    """Shard a network in place, block by block; adapters are left out. It moves to the process' device with that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapters = {parameter for name, parameter in network.named_parameters() if "lora_" in name}
    for parameter in adapters:
        parameter.data = parameter.data.to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*blocks(network), network):
        fully_shard(part, mesh=mesh, ignored_params=adapters)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of the network's own lists of modules: what repeats."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all weights; of a sharded network those of this process."""
    local = lambda tensor: tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return sum(_bytes(local(parameter.data)) for parameter in network.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    """Of what a tensor really holds: a quantised one says the type that it stands for."""
    if type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
