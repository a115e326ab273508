"""The values that travel between rollout, algorithms and update, with the legend of shape letters.

B samples of this process, N samples of all processes in an epoch, b rows of a micro-batch, T denoising steps
(0 = noisiest), E width of an image embedding, (C, h, w) a latent, (L, D) a prompt's token embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """The Gaussian p(x_{t-1} | x_t, c) of one denoising step."""

    mean: Tensor  # [b,C,h,w] float32
    std: Tensor  # [b,1,1,1] float32

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """ln N(x; mean, std), the mean over latent elements. -> [b]"""
        # mean, not sum: the clip range depends on it
        z_squared = (x.detach() - self.mean) ** 2 / (2 * self.std**2)
        density = -z_squared - torch.log(self.std) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=tuple(range(1, density.ndim)))


@dataclass(frozen=True)
class Trajectory:
    """Every step of a set of samples, in the order of `sample_ids`. Never shuffled in place: shuffle indices."""

    epoch: int
    prompts: tuple[str, ...]  # [B] as drawn
    prompt_keys: tuple[str, ...]  # [B] as the text encoder saw them; statistics per prompt are kept under these
    sample_ids: Tensor  # [B] int64, global within the epoch
    prompt_embeds: Tensor  # [B,L,D]
    timesteps: Tensor  # [T] int64
    latents: Tensor  # [B,T+1,C,h,w] float32; entry k is the state before step k, entry T the final latent
    log_probs: Tensor  # [B,T] float32, means over latent elements
    ref_log_probs: Tensor | None  # [B,T], the same transitions under the initial policy
    image_embeds: Tensor | None  # [B,T,E], of the state before each step; None without a critic
    values: Tensor | None  # [B,T], the critic's estimate of the return; None without a critic
    images: Tensor  # [B,3,H,W] float32 in [0,1], the final images; none any more once they are scored

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Credit:
    """What an algorithm makes of an epoch's rewards: how much each step of each sample was worth."""

    advantages: Tensor  # [N,T] float64
    returns: Tensor  # [N,T] float64
    normed_rewards: Tensor  # [N] float64, the training reward after normalisation, before clipping
    mean_kl: float | None  # mean over samples of the sum over steps of log p - log p_ref


@dataclass(frozen=True)
class ShufflePlan:
    """The order in which one inner epoch visits (sample, step) pairs: row n, column j -> one pair."""

    sample_index: Tensor  # [N,T'] int64
    step_index: Tensor  # [N,T'] int64

    def first_columns(self, count: int) -> ShufflePlan:
        return ShufflePlan(self.sample_index[:, :count], self.step_index[:, :count])

    def optimizer_steps(self, batch_size: int, all_timesteps: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs of each optimizer step, as (sample_index [n], step_index [n]).

        TDPO takes one optimizer step per batch and timestep slot; DDPO's authors accumulate a batch's gradients over
        all timesteps (`all_timesteps`), T' times fewer and larger steps.
        """
        rows, columns = self.sample_index.shape
        width = columns if all_timesteps else 1
        for first_column in range(0, columns, width):
            for first_row in range(0, rows, batch_size):
                block = slice(first_row, first_row + batch_size), slice(first_column, first_column + width)
                # column by column, so that a micro-batch holds the same slot of many samples
                yield self.sample_index[block].T.reshape(-1), self.step_index[block].T.reshape(-1)
