"""Every random draw of a run, each a function of (seed, purpose, epoch, ...) alone.

No generator state lives between draws, so nothing has to be saved or replayed: a sample's prompt and noise are the same
on one process or eight, in any batch size, resumed or not. Draws are made on the CPU and moved. A trace or a test hands
in its own object with the same methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo_cli.types import ShufflePlan


class Randomness:
    """`purpose` keeps apart the draws of training, previews, sampling and evaluation under one seed."""

    def __init__(self, seed: int, purpose: str = "train"):
        self.seed = seed
        self.purpose = purpose

    def generator(self, *key: int | str) -> torch.Generator:
        """A CPU generator whose seed is a stable hash of (seed, purpose, *key)."""
        text = "/".join(map(str, (self.seed, self.purpose, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    # --- rollout --------------------------------------------------------------------------------------------------------
    def prompts(self, epoch: int, sample_ids: Sequence[int], choices: Sequence[str]) -> tuple[str, ...]:
        """One prompt per sample, uniform with replacement."""
        draw = lambda i: torch.randint(len(choices), (), generator=self.generator("prompt", epoch, i)).item()
        return tuple(choices[draw(i)] for i in sample_ids)

    def groups(self, epoch: int, count: int, group_size: int, choices: Sequence[str]) -> tuple[str, ...]:
        """So many distinct prompts, each for `group_size` samples that follow each other."""
        chosen = torch.randperm(len(choices), generator=self.generator("groups", epoch))[:count].tolist()
        return tuple(choices[i] for i in chosen for _ in range(group_size))

    def window(self, epoch: int, choices: int) -> int:
        """Which of so many windows of denoising steps an epoch has: the same for all samples."""
        return torch.randint(choices, (), generator=self.generator("window", epoch)).item()

    def initial_latents(self, epoch: int, sample_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """x_T ~ N(0, I). -> [b,*shape] float32"""
        return self._normal(("latents", epoch), sample_ids, shape)

    def step_noise(self, epoch: int, step: int, sample_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The z of denoising step `step`. -> [b,*shape] float32"""
        return self._normal(("noise", epoch, step), sample_ids, shape)

    def _normal(self, key: tuple, sample_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=self.generator(*key, int(i))) for i in sample_ids])

    # --- update ---------------------------------------------------------------------------------------------------------
    def permutation(self, epoch: int, inner: int, n: int) -> Tensor:
        """The order of the samples in one inner epoch, relative to the order before. -> [n] int64"""
        return torch.randperm(n, generator=self.generator("samples", epoch, inner))

    def step_permutations(self, epoch: int, inner: int, n: int, steps: int) -> Tensor:
        """For each (already permuted) row its own order of the denoising steps. -> [n,steps] int64"""
        generator = self.generator("steps", epoch, inner)
        return torch.stack([torch.randperm(steps, generator=generator) for _ in range(n)])

    def keep_masks(
        self, epoch: int, inner: int, step: int, rows: int, widths: Sequence[int], drop: Sequence[float], repeat: int = 0
    ) -> list[Tensor] | None:
        """Dropout's keep masks for the critic at optimizer step `step` of an inner epoch. -> one [rows,width] bool per layer"""
        generator = self.generator("dropout", epoch, inner, step, *([repeat] if repeat else []))
        return [torch.rand(rows, width, generator=generator) >= p for width, p in zip(widths, drop, strict=True)]

    # --- weights --------------------------------------------------------------------------------------------------------
    def reset(self, epoch: int, inner: int) -> torch.Generator:
        """Draws the re-initialised neurons of one reset."""
        return self.generator("reset", epoch, inner)

    def initial_weights(self, network: str) -> torch.Generator:
        """Draws the first weights of `network` (critic, lora)."""
        return self.generator("init", network)


def shuffle_plan(randomness: Randomness, epoch: int, inner: int, before: ShufflePlan, shuffle_samples: bool, shuffle_timesteps: bool) -> ShufflePlan:
    """Permute the rows of the plan before, then the columns of every row on its own: shuffles accumulate over inner epochs."""
    sample_index, step_index = before.sample_index, before.step_index
    n, steps = sample_index.shape
    if shuffle_samples:
        order = randomness.permutation(epoch, inner, n)
        sample_index, step_index = sample_index[order], step_index[order]
    if shuffle_timesteps:
        orders = randomness.step_permutations(epoch, inner, n, steps)
        # a row holds one sample throughout, so only its steps move
        step_index = step_index.gather(1, orders)
    return ShufflePlan(sample_index, step_index)


def unshuffled(n: int, steps: int) -> ShufflePlan:
    """Row = sample, column = step."""
    return ShufflePlan(
        sample_index=torch.arange(n).unsqueeze(1).expand(n, steps).contiguous(),
        step_index=torch.arange(steps).unsqueeze(0).expand(n, steps).contiguous(),
    )
