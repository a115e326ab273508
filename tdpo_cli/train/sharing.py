"""Who samples what, who trains on what, and the latents that travel between them.

A latent is large: 10 steps of a 1024-pixel image are 11.5 MB. So each stays with the process that sampled it, and goes only to a process
that trains on it. In an inner epoch that is one process per sample: a batch is cut by rows, and a row is one sample at all its steps.
Everything here but the latents themselves is computed by every process alone, from seed and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpo_cli.machine.transfer import rows, send
from tdpo_cli.machine.world import World
from tdpo_cli.train.rollout import Draw
from tdpo_cli.types import ShufflePlan, Trajectory


def trainers(order: ShufflePlan, batch_size: int, world: World) -> Tensor:
    """The process that trains on each sample in an inner epoch of that order. -> [N] int64"""
    count = len(order.sample_index)
    by_row = torch.cat([world.ranks(min(batch_size, count - start)) for start in range(0, count, batch_size)])
    process = torch.empty(count, dtype=torch.int64)
    process[order.sample_index[:, 0]] = by_row
    return process


def homes(order: ShufflePlan, batch_size: int, world: World) -> Tensor:
    """The process that samples each sample and keeps its latents. -> [N] int64

    It is the one that trains on the sample in the first inner epoch, whose order is given: then nothing has to travel. Where batches
    cannot be cut into equal parts, some processes would sample more than others: there each takes consecutive samples.
    """
    if batch_size % world.size == 0:
        return trainers(order, batch_size, world)
    return world.ranks(len(order.sample_index))


def of_all(own: Trajectory, draw: Draw, scores: dict[str, Tensor], home: Tensor, world: World) -> tuple[Trajectory, dict[str, Tensor]]:
    """Samples and scores of all processes, ordered by sample id, on every process; latents only of this one's samples, images of none."""
    nothing = own.images.new_empty(0, *own.images.shape[1:])
    small = {name: getattr(own, name) for name in ("log_probs", "ref_log_probs", "image_embeds", "values")}
    columns = {name: column for name, column in small.items() if column is not None}
    columns |= {f"scores/{name}": score for name, score in scores.items()}
    whole = world.gather(columns, home)
    scores = {name: whole.pop(f"scores/{name}") for name in scores}
    everyone = replace(
        own, prompts=draw.prompts, prompt_keys=draw.prompt_keys, sample_ids=torch.arange(len(draw)), text_rows=draw.text_rows,
        images=nothing, home=home, **whole,
    )  # fmt: skip
    return everyone, scores


@dataclass(frozen=True)
class Latents:
    """The latents that this process trains on: its own, and visitors of one inner epoch."""

    own: Tensor  # [B,S+1,C,h,w] where the rollout left them
    visitors: Tensor  # [V,S+1,C,h,w] in main memory; V is 0 where nothing had to travel
    place: Tensor  # [N] int64, each sample's row in `own` and then in `visitors`; -1 for those that are elsewhere

    def states(self, sample: Tensor, entry: Tensor, device: torch.device) -> Tensor:
        """Entry `entry` of each sample, on the device. [b], [b] -> [b,C,h,w]"""
        place = self.place[sample]
        if not len(self.visitors):
            place, entry = rows(self.own, place, entry)
            return send(self.own[place, entry], device)
        states = torch.empty(len(sample), *self.own.shape[2:], device=device)
        visiting = place >= len(self.own)
        for held, here, first in ((self.own, ~visiting, 0), (self.visitors, visiting, len(self.own))):
            held_place, held_entry = rows(held, place[here] - first, entry[here])
            states[here.to(device)] = send(held[held_place, held_entry], device)
        return states


def latents_of(samples: Trajectory, order: ShufflePlan, batch_size: int, world: World) -> Latents:
    """Exchange latents so that every process has those it trains on in this inner epoch. Own samples stay where they are."""
    nobody = samples.latents.new_empty(0, *samples.latents.shape[1:], device="cpu")
    if samples.home is None or world.size == 1:
        return Latents(samples.latents, nobody, torch.arange(len(samples)))
    trainer, place = trainers(order, batch_size, world), torch.full((len(samples),), -1)
    own = (samples.home == world.rank).nonzero().flatten()
    place[own] = torch.arange(len(own))
    others = [rank for rank in range(world.size) if rank != world.rank]
    wanted = lambda holder, reader: ((samples.home == holder) & (trainer == reader)).nonzero().flatten()
    outgoing = {rank: place[wanted(world.rank, rank)] for rank in others}
    incoming = {rank: wanted(rank, world.rank) for rank in others}
    visitors = world.exchange(samples.latents, outgoing, {rank: len(ids) for rank, ids in incoming.items()})
    arrived = torch.cat([incoming[rank] for rank in others])
    place[arrived] = len(own) + torch.arange(len(arrived))
    return Latents(samples.latents, visitors, place)
