"""The values that travel between rollout, algorithms and update, with the legend of shape letters.

B samples of this process, N samples of all processes in an epoch, b rows of a micro-batch, T denoising steps
(0 = noisiest), S trained ones of them, E width of an image embedding, (C, h, w) a latent of any rank, P distinct prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser reads of prompts: named tensors, one row per prompt. Only the family that made it looks inside.

    For example {"embeds": [P,L,D], "pooled": [P,D2], "mask": [P,L], "time_ids": [P,6]}.
    """

    parts: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Conditioning:
        """The rows of an index tensor, a slice or a list."""
        return Conditioning({name: part[rows] for name, part in self.parts.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({name: part.to(device) for name, part in self.parts.items()})

    def clone(self) -> Conditioning:
        return Conditioning({name: part.clone() for name, part in self.parts.items()})

    @staticmethod
    def cat(several: Sequence[Conditioning]) -> Conditioning:
        """All rows below each other; texts of different lengths are padded at their ends with 0 or False."""
        names = several[0].parts
        return Conditioning({name: torch.cat(_padded([one.parts[name] for one in several])) for name in names})


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[b_i,n_i,...] -> [b_i,max n,...], zeros at the end of every dimension but the first."""
    sizes = [max(dims) for dims in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == sizes for tensor in tensors):
        return list(tensors)
    padded = []
    for tensor in tensors:
        whole = tensor.new_zeros(len(tensor), *sizes)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(whole)
    return padded


@dataclass(frozen=True)
class Transition:
    """The Gaussian p(x_{t-1} | x_t, c) of one denoising step."""

    mean: Tensor  # [b,C,h,w] float32
    std: Tensor  # [b,1,1,1] float32; 0 where the step is deterministic
    x0: Tensor  # [b,C,h,w] float32, the clean image that the network predicts from x_t
    prediction: Tensor | None = None  # [b,C,h,w], what the network said, with guidance; set by `Policy.transition`

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """ln N(x; mean, std), the mean over latent elements. -> [b]"""
        # mean, not sum: the clip range depends on it
        z_squared = (x.detach() - self.mean) ** 2 / (2 * self.std**2)
        density = -z_squared - torch.log(self.std) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=tuple(range(1, density.ndim)))

    def kl(self, reference: Transition) -> Tensor:
        """KL(self, reference) of two Gaussians of equal std, the mean over latent elements. -> [b]"""
        divergence = (self.mean - reference.mean) ** 2 / (2 * self.std**2)
        return divergence.mean(dim=tuple(range(1, divergence.ndim)))


@dataclass(frozen=True)
class Trajectory:
    """The trained steps of a set of samples, in the order of `sample_ids`. Never shuffled in place: shuffle indices.

    Columns are the S trained steps, which follow each other; `steps` says which of the T steps each column is.
    """

    epoch: int
    prompts: tuple[str, ...]  # [B] as drawn
    prompt_keys: tuple[str, ...]  # [B] as the text encoder saw them; statistics per prompt are kept under these
    sample_ids: Tensor  # [B] int64, global within the epoch
    texts: Conditioning  # a row per distinct prompt of the epoch, of all processes; the negative prompt last
    text_rows: Tensor  # [B] int64, each sample's row of `texts`
    steps: Tensor  # [S] int64, the index k in [0, T) of each column
    latents: Tensor  # [B,S+1,C,h,w] float32; entry j is the state before the step of column j
    log_probs: Tensor  # [B,S] float32, means over latent elements
    ref_log_probs: Tensor | None  # [B,S], the same transitions under the initial policy
    image_embeds: Tensor | None  # [B,S,E], all that the critic reads of a step; [B,S,E+1] with k/T last where its state is x0; None without a critic
    values: Tensor | None  # [B,S], the critic's estimate of the return; None without a critic
    images: Tensor  # [B,3,H,W] float32 in [0,1], the final images; none any more once they are scored
    home: Tensor | None = None  # [B] int64, the process that keeps each sample's latents, by sample id; None: all are here

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Credit:
    """What an algorithm makes of an epoch's rewards: how much each step of each sample was worth."""

    advantages: Tensor  # [N,S] float64
    returns: Tensor  # [N,S] float64
    normed_rewards: Tensor  # [N] float64, the training reward after normalisation, or the combination of several; before clipping
    mean_kl: float | None  # mean over samples of the sum over steps of log p - log p_ref


@dataclass(frozen=True)
class ShufflePlan:
    """The order in which one inner epoch visits (sample, column) pairs: row n, column j -> one pair."""

    sample_index: Tensor  # [N,S'] int64
    step_index: Tensor  # [N,S'] int64, columns of the trajectory

    def first_columns(self, count: int) -> ShufflePlan:
        return ShufflePlan(self.sample_index[:, :count], self.step_index[:, :count])

    def optimizer_steps(self, batch_size: int, all_timesteps: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs of each optimizer step, as (sample_index [n], step_index [n]).

        TDPO takes one optimizer step per batch and timestep slot; DDPO's authors accumulate a batch's gradients over
        all timesteps (`all_timesteps`), S' times fewer and larger steps.
        """
        rows, columns = self.sample_index.shape
        width = columns if all_timesteps else 1
        for first_column in range(0, columns, width):
            for first_row in range(0, rows, batch_size):
                block = slice(first_row, first_row + batch_size), slice(first_column, first_column + width)
                # column by column, so that a micro-batch holds the same slot of many samples
                yield self.sample_index[block].T.reshape(-1), self.step_index[block].T.reshape(-1)
