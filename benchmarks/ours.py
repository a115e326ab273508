"""tdpo's own epoch in parts that can be timed, and the bare network calls that it contains."""

from __future__ import annotations

import torch
from setup import Bench
from standin import Trained
from torch import Tensor

from tdpo_cli import algorithms
from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.world import World
from tdpo_cli.randomness import shuffle_plan, unshuffled
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import make_optimizers
from tdpo_cli.train.update import Learner, Observer
from tdpo_cli.types import Credit, ShufflePlan, Trajectory


def sample(bench: Bench, plan: Plan, epoch: int = 0) -> Trajectory:
    actor = Actor(bench.policy, bench.critic, bench.encoder, bench.randomness, bench.preset, plan)
    return actor.rollout(actor.draw(epoch, bench.prompts), range(bench.size.samples))


@torch.no_grad()
def score(bench: Bench, trajectory: Trajectory, chunk: int = 48) -> Tensor:
    parts = zip(trajectory.images.split(chunk), _chunks(trajectory.prompts, chunk), strict=True)
    return torch.cat([bench.reward.score(images, prompts).float().cpu() for images, prompts in parts])


def credit(bench: Bench, trajectory: Trajectory, scores: Tensor) -> Credit:
    return credit_of(algorithms.make(bench.preset), trajectory, {bench.preset.reward.train: scores})


def order(bench: Bench, epoch: int = 0) -> ShufflePlan:
    return shuffle_plan(bench.randomness, epoch, 0, unshuffled(bench.size.samples, bench.size.steps), True, True)


class _First(Observer):
    def __init__(self, bench: Bench):
        self.bench, self.gradient = bench, None

    def gradients(self, index: int) -> None:
        if index == 0:
            self.gradient = torch.cat([weight.grad.flatten() for weight in self.bench.policy.trainable.values()]).clone()


def train(bench: Bench, plan: Plan, trajectory: Trajectory, credit_: Credit, shuffled: ShufflePlan) -> Trained:
    watch = _First(bench)
    optimizers = make_optimizers(bench.policy, bench.critic, bench.preset)
    learner = Learner(bench.policy, bench.critic, optimizers, bench.preset, bench.randomness, plan, World(device=bench.device))
    steps = learner.inner_epoch(trajectory, credit_, shuffled, 0, watch)
    return Trained(len(steps), watch.gradient, steps[0].policy.log_ratios.abs().max().item())


# --- nothing but the networks -----------------------------------------------------------------------------------------
class Bare:
    """The same calls of the same shapes, on inputs made beforehand: no noise, no log-prob, no loss, no optimizer."""

    def __init__(self, bench: Bench, plan: Plan):
        self.bench, self.plan, self.guided = bench, plan, 2 if bench.preset.rollout.guidance_scale > 1 else 1
        draw = torch.Generator().manual_seed(0)
        make = lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=draw).to(bench.device, dtype)
        unet, vae = bench.policy.family.network, bench.policy.family.pipeline.vae
        rows = max(plan.sample_batch, min(plan.micro_batch, bench.size.batch)) * self.guided
        self.x = make(rows, *bench.policy.latent_shape, dtype=unet.dtype)
        self.t = torch.full((rows,), 500, device=bench.device)
        self.text = bench.policy.encode(["a"]).parts["embeds"][:1].to(unet.dtype).expand(rows, -1, -1).contiguous()
        self.z = make(plan.decode_chunk, *bench.policy.latent_shape, dtype=vae.dtype)
        side = bench.encoder.image_size
        self.pixels = make(plan.decode_chunk, 3, side, side)
        self.embeds = make(bench.size.batch, bench.encoder.embed_dim)

    def unet(self, samples: int) -> Tensor:
        rows = samples * self.guided
        return self.bench.policy.family.network(self.x[:rows], self.t[:rows], encoder_hidden_states=self.text[:rows], return_dict=False)[0]

    @torch.inference_mode()
    def denoise(self) -> None:
        for rows in _pieces(self.bench.size.samples, self.plan.sample_batch):
            for _ in range(self.bench.size.steps):
                self.unet(rows)

    @torch.inference_mode()
    def decode(self) -> None:
        """The final images, and every state before a step."""
        samples, chunk = self.bench.size.samples, self.plan.decode_chunk
        for rows in [*_pieces(samples, chunk), *_pieces(samples * self.bench.size.steps, chunk)]:
            self.bench.policy.family.pipeline.vae.decode(self.z[:rows], return_dict=False)

    @torch.inference_mode()
    def encode(self) -> None:
        for rows in _pieces(self.bench.size.samples * self.bench.size.steps, self.plan.decode_chunk):
            self.bench.encoder._encode(self.pixels[:rows])
        for rows in _pieces(self.bench.size.samples, self.plan.decode_chunk):  # the reward's
            self.bench.encoder._encode(self.pixels[:rows])

    def train(self) -> None:
        for _ in range(self.bench.size.steps * self.bench.size.samples // self.bench.size.batch):
            for rows in _pieces(self.bench.size.batch, self.plan.micro_batch):
                prediction = self.unet(rows)
                prediction.backward(torch.ones_like(prediction))
            self.bench.critic(self.embeds).sum().backward()
            for weight in (*self.bench.policy.trainable.values(), *self.bench.critic.parameters()):
                weight.grad = None

    def epoch(self) -> None:
        self.denoise()
        self.decode()
        self.encode()
        self.train()


def _pieces(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def _chunks(things: tuple, size: int) -> list[tuple]:
    return [things[start : start + size] for start in range(0, len(things), size)]
