"""Denoise prompts under the current policy and keep every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tdpo_cli.critic import Critic
from tdpo_cli.models import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards.backbones import ImageEncoder
from tdpo_cli.types import Trajectory, Transition

DECODE_CHUNK = 48  # images per VAE and encoder call; larger is slower again on a CPU


def denoise(
    policy: Policy, embeds: Tensor, x_T: Tensor, noise: Callable[[int], Tensor], guidance: float
) -> Iterator[tuple[int, Tensor, Transition, Tensor]]:
    """The chain from pure noise to the final latent: yields (k, x before step k, its transition, x after)."""
    x_t = x_T
    for k in range(len(policy.timesteps)):
        step = torch.full((len(x_t),), k, device=x_t.device)
        transition = policy.transition(x_t, step, embeds, guidance)
        x_next = transition.sample(noise(k).to(x_t))
        yield k, x_t, transition, x_next
        x_t = x_next


def generate(
    policy: Policy,
    prompts: Sequence[str],
    sample_ids: Sequence[int],
    randomness: Randomness,
    guidance: float,
    batch_size: int,
    on_step: Callable[[int], None] = lambda samples: None,
) -> Iterator[Tensor]:
    """Images of prompts, a batch at a time. Noise depends on (randomness, sample id) only. Yields [b,3,H,W] in [0,1]."""
    for start in range(0, len(prompts), batch_size):
        ids = sample_ids[start : start + batch_size]
        with torch.inference_mode():
            embeds = policy.encode(prompts[start : start + batch_size])
            x = randomness.initial_latents(0, ids, policy.latent_shape).to(policy.device)
            noise = lambda k, ids=ids: randomness.step_noise(0, k, ids, policy.latent_shape)  # noqa: E731
            for _, _, _, x in denoise(policy, embeds, x, noise, guidance):
                on_step(len(ids))
            images = policy.decode(x)
        yield images.clone()


def rollout(
    policy: Policy,
    critic: Critic | None,
    encoder: ImageEncoder | None,
    randomness: Randomness,
    prompts: Sequence[str],
    epoch: int,
    sample_ids: Sequence[int],
    guidance: float,
    reference: bool,
    micro_batch: int,
    on_step: Callable[[int], None] = lambda samples: None,
) -> Trajectory:
    """One sample per id: its prompt drawn from `prompts`, its noise from the randomness. `on_step` hears of finished steps."""
    drawn = randomness.prompts(epoch, sample_ids, prompts)
    shape = policy.latent_shape
    latents, log_probs, ref_log_probs = [], [], []
    with torch.inference_mode():
        prompt_embeds = policy.encode(drawn)
        for start in range(0, len(sample_ids), micro_batch):
            ids = sample_ids[start : start + micro_batch]
            embeds = prompt_embeds[start : start + micro_batch]
            x_T = randomness.initial_latents(epoch, ids, shape).to(policy.device)
            noise = lambda k, ids=ids: randomness.step_noise(epoch, k, ids, shape)  # noqa: E731
            states, densities, ref_densities = [x_T], [], []
            for k, x_t, transition, x_next in denoise(policy, embeds, x_T, noise, guidance):
                states.append(x_next)
                densities.append(transition.log_prob(x_next))
                if reference:
                    step = torch.full((len(x_t),), k, device=x_t.device)
                    ref_densities.append(policy.transition(x_t, step, embeds, guidance, reference=True).log_prob(x_next))
                on_step(len(ids))
            latents.append(torch.stack(states, dim=1))
            log_probs.append(torch.stack(densities, dim=1))
            ref_log_probs += [torch.stack(ref_densities, dim=1)] if reference else []
        images = torch.cat([policy.decode(chunk) for chunk in torch.cat([x[:, -1] for x in latents]).split(DECODE_CHUNK)])
    # torch.cat outside inference mode makes ordinary tensors, which the update may save for its backward pass
    latents = torch.cat(latents)
    image_embeds, values = _look(policy, critic, encoder, latents) if critic is not None and encoder is not None else (None, None)
    return Trajectory(
        epoch=epoch,
        prompts=tuple(drawn),
        prompt_keys=_normal_forms(policy, drawn),
        sample_ids=torch.as_tensor(list(sample_ids), dtype=torch.int64),
        prompt_embeds=prompt_embeds.clone(),
        timesteps=policy.timesteps.clone(),
        latents=latents,
        log_probs=torch.cat(log_probs),
        ref_log_probs=torch.cat(ref_log_probs) if reference else None,
        image_embeds=image_embeds,
        values=values,
        images=images.clone(),
    )


def _look(policy: Policy, critic: Critic, encoder: ImageEncoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What the critic sees of, and says to, the state before every step; the final latent is not looked at.

    After the denoising loop and in chunks: sampling does not need the values.
    """
    samples, states = latents.shape[:2]
    flat = latents[:, :-1].flatten(0, 1)
    with torch.inference_mode():
        embeds = torch.cat([encoder(policy.decode(chunk)) for chunk in flat.split(DECODE_CHUNK)])
        values = critic(embeds)
    return embeds.clone().unflatten(0, (samples, states - 1)), values.clone().unflatten(0, (samples, states - 1))


def _normal_forms(policy: Policy, prompts: Sequence[str]) -> tuple[str, ...]:
    form = {prompt: policy.normal_form(prompt) for prompt in set(prompts)}
    return tuple(form[prompt] for prompt in prompts)
