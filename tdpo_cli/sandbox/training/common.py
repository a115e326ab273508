"""What every part of the build shares: progress lines, learning rates, moving averages, fp16 on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tdpo_cli.sandbox.world import LARGEST, Scene, sample_scenes


def steps(name: str, total: int, every: int = 100) -> Iterator[int]:
    """Count through a training loop and print at times how far it is."""
    start = time.process_time()
    for step in range(total):
        yield step
        if (step + 1) % every == 0 or step + 1 == total:
            print(f"{name:12s} step {step + 1:6d} / {total}   {time.process_time() - start:6.0f} CPU-s", flush=True)


def cosine_schedule(optimizer: torch.optim.Optimizer, total: int, warmup: int = 50) -> LRScheduler:
    """Linear warm-up, then half a cosine down to 2 % of the learning rate."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return LambdaLR(optimizer, factor)


class Average:
    """An exponential moving average of a network's weights, short at first."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, value in network.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def wide_scenes(generator: torch.Generator, n: int, share: float = 0.25) -> Scene:
    """Scenes, a share of them larger than the world's own: pictures of a trained policy may be so."""
    scenes = sample_scenes(generator, n)
    grow = 1 + 0.5 * torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < share)
    centring = (1.5 - grow) * 2  # the larger, the closer to the middle
    size = (scenes.size * grow).clamp(max=1.5 * LARGEST)
    return replace(scenes, size=size, x=scenes.x * centring, y=scenes.y * centring)


def signed(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], what autoencoders of diffusers take."""
    return images * 2 - 1


def save_half(model, folder: Path) -> None:
    """Write a diffusers or transformers model with fp16 weights."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone; a package is for everyone
