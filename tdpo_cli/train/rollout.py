"""Sampling an epoch: denoise prompts under the current policy and keep its trained steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import WorkError
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.transfer import room, send
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards.backbones import Backbones, ImageEncoder
from tdpo_cli.sampling.generate import denoise, encode
from tdpo_cli.types import Conditioning, Trajectory, Transition


@dataclass(frozen=True)
class Draw:
    """The prompts of all N samples of an epoch: a function of seed and epoch, so every process makes the same one alone."""

    epoch: int
    prompts: tuple[str, ...]  # [N]
    prompt_keys: tuple[str, ...]  # [N] as the text encoder saw them
    texts: Conditioning  # a row per distinct prompt, the negative prompt last
    text_rows: Tensor  # [N] int64, each sample's row of `texts`

    def __len__(self) -> int:
        return len(self.prompts)


def draw_prompts(preset: Preset, randomness: Randomness, epoch: int, choices: Sequence[str]) -> tuple[str, ...]:
    """A prompt for every sample of the epoch, or one for each group. -> [N]"""
    count, group = preset.rollout.samples_per_epoch, preset.group_size
    if group is None:
        return randomness.prompts(epoch, range(count), choices)
    return randomness.groups(epoch, count // group, group, choices)


class Actor:
    """Samples under the current policy. With a critic, also what the critic sees of every state and the value it gives."""

    def __init__(
        self, policy: Policy, critic: Critic | None, encoder: ImageEncoder | None, randomness: Randomness,
        preset: Preset, plan: Plan, backbones: Backbones | None = None, view: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.policy, self.critic, self.encoder, self.randomness = policy, critic, encoder, randomness
        self.preset, self.plan = preset, plan
        self.backbones, self.view = backbones or Backbones(), view or policy.decode

    def draw(self, epoch: int, choices: Sequence[str]) -> Draw:
        """Draw a prompt of `choices` for every sample of the epoch, or one for each group; encode each distinct one once."""
        prompts = draw_prompts(self.preset, self.randomness, epoch, choices)
        key = {prompt: self.policy.normal_form(prompt) for prompt in set(prompts)}
        with torch.inference_mode():
            texts, rows = encode(self.policy, prompts)
        # copies made outside inference mode are ordinary tensors, which the update may save for its backward pass
        return Draw(epoch, tuple(prompts), tuple(key[prompt] for prompt in prompts), texts.clone(), rows.clone())

    def rollout(self, draw: Draw, sample_ids: Sequence[int], on_step: Callable[[int], None] = lambda samples: None) -> Trajectory:
        """Sample the ids of a draw. `on_step(samples)` is called after every denoising step of a batch."""
        film = self._film(len(sample_ids))
        rows = draw.text_rows[torch.as_tensor(list(sample_ids), device=draw.text_rows.device)]
        with torch.inference_mode():
            for start in range(0, len(sample_ids), self.plan.sample_batch):
                batch = slice(start, start + self.plan.sample_batch)
                self._denoise(film, batch, draw, sample_ids[batch], rows[batch], on_step)
            if self.policy.device.type == "cuda" and self.plan.offload:
                torch.cuda.current_stream(self.policy.device).synchronize()  # copies to main memory are under way until now
            images = self._decoded(film.final)
        look = self._look(film) if self._looks else Look()
        return Trajectory(
            epoch=draw.epoch,
            prompts=tuple(draw.prompts[i] for i in sample_ids),
            prompt_keys=tuple(draw.prompt_keys[i] for i in sample_ids),
            sample_ids=torch.as_tensor(list(sample_ids), dtype=torch.int64),
            texts=draw.texts,
            text_rows=rows,
            steps=torch.tensor(film.steps),
            latents=film.latents,
            log_probs=film.log_probs,
            ref_log_probs=film.ref_log_probs,
            image_embeds=look.embeds,
            values=look.values,
            images=images.clone(),
        )

    @property
    def _looks(self) -> bool:
        return self.critic is not None and self.encoder is not None

    def _film(self, count: int) -> Film:
        """Room for what is kept of `count` samples. Made outside inference mode, so ordinary tensors; filled in place, once."""
        policy, steps = self.policy, trained_steps(self.policy)
        if steps != list(range(steps[0], steps[0] + self.preset.stochastic_steps)):
            raise WorkError(f"the sampler has noise in steps {steps}; the preset counts {self.preset.stochastic_steps} that follow each other.")
        shape, offload = policy.latent_shape, self.plan.offload
        latents = room((count, len(steps) + 1, *shape), policy.device, offload)
        ends = steps[-1] == len(policy.timesteps) - 1
        scores = lambda: torch.empty(count, len(steps), device=policy.device)
        return Film(
            steps=steps,
            latents=latents,
            final=latents[:, -1] if ends else room((count, *shape), policy.device, offload),
            log_probs=scores(),
            ref_log_probs=scores() if self.preset.scores_reference else None,
            x0=room((count, len(steps), *shape), policy.device, offload) if self._looks and self.preset.algorithm.critic_state == "x0" else None,
        )

    def _denoise(self, film: Film, batch: slice, draw: Draw, ids: Sequence[int], rows: Tensor, on_step: Callable[[int], None]) -> None:
        """From noise to the final latent, a batch of samples together."""
        policy, guidance, shape = self.policy, self.preset.rollout.guidance_scale, self.policy.latent_shape
        x_T = send(self.randomness.initial_latents(draw.epoch, ids, shape), policy.device)
        noise = lambda k: self.randomness.step_noise(draw.epoch, k, ids, shape)
        for k, x_t, transition, x_next in denoise(policy, draw.texts, rows, x_T, noise, guidance):
            if k in film.steps:
                column = film.steps.index(k)
                film.keep(batch, column, x_t, transition, x_next)
                if film.ref_log_probs is not None:
                    step = torch.full((len(x_t),), k, device=x_t.device)
                    reference = policy.transition(x_t, step, draw.texts, rows, guidance, reference=True)
                    film.ref_log_probs[batch, column] = reference.log_prob(x_next)
            on_step(len(ids))
        if k not in film.steps:
            film.final[batch].copy_(x_next, non_blocking=True)

    def _decoded(self, final: Tensor) -> Tensor:
        """The final images [B,3,H,W], a chunk at a time; in main memory if they are to be offloaded."""
        parts = (self.policy.decode(part) for part in final.split(self.plan.decode_chunk))
        return torch.cat([part.cpu() if self.plan.offload else part for part in parts])

    def _look(self, film: Film) -> Look:
        """What the critic sees of every trained step, and its values. After the denoising loop and in chunks: sampling needs neither."""
        seen, samples, columns = film.latents if film.x0 is None else film.x0, len(film.latents), len(film.steps)
        pairs = torch.arange(samples * columns, device=seen.device)  # rows of a chunk are gathered, never a second copy of all
        with torch.inference_mode(), self.backbones.awake(self.encoder):
            parts = (seen[part // columns, part % columns] for part in pairs.split(self.plan.decode_chunk))
            embeds = torch.cat([self.encoder(self.view(send(part, self.policy.device))) for part in parts])
            if film.x0 is not None:
                # a clean image does not show how far the denoising is
                progress = torch.tensor(film.steps, device=embeds.device) / len(self.policy.timesteps)
                embeds = torch.cat([embeds, progress.repeat(samples).unsqueeze(1)], dim=1)
            values = self.critic(embeds)
        return Look(embeds.clone().unflatten(0, (samples, columns)), values.clone().unflatten(0, (samples, columns)))


def trained_steps(policy: Policy) -> list[int]:
    """The steps k that have a log-probability, in order: all of them with DDIM."""
    return policy.stochastic.nonzero().flatten().tolist()


@dataclass(frozen=True)
class Film:
    """What is kept while samples are denoised."""

    steps: list[int]  # [S] the step k of each column
    latents: Tensor  # [B,S+1,C,h,w]; entry j is the state before the step of column j
    final: Tensor  # [B,C,h,w]; the last entry of `latents` where the last step is kept
    log_probs: Tensor  # [B,S]
    ref_log_probs: Tensor | None  # [B,S]
    x0: Tensor | None = None  # [B,S,C,h,w], the clean image predicted from the state before each step; kept only where the critic sees it

    def keep(self, batch: slice, column: int, x_t: Tensor, transition: Transition, x_next: Tensor) -> None:
        if column == 0:
            self.latents[batch, 0].copy_(x_t, non_blocking=True)
        self.latents[batch, column + 1].copy_(x_next, non_blocking=True)
        self.log_probs[batch, column] = transition.log_prob(x_next)
        if self.x0 is not None:
            self.x0[batch, column].copy_(transition.x0, non_blocking=True)


@dataclass(frozen=True)
class Look:
    """The critic's view of each trained step."""

    embeds: Tensor | None = None  # as `Trajectory.image_embeds`
    values: Tensor | None = None  # [B,S]
