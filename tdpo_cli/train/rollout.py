"""Denoise prompts under the current policy and keep every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.machine.transfer import room, send
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards.backbones import ImageEncoder
from tdpo_cli.sampling.generate import denoise, encode
from tdpo_cli.types import Trajectory

DECODE_CHUNK = 48  # images per VAE and encoder call; larger is slower again on a CPU


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
    decode_chunk: int = DECODE_CHUNK,
    offload: bool = False,
    looking: AbstractContextManager = nullcontext(),
) -> Trajectory:
    """One sample per id: its prompt drawn from `prompts`, its noise from the randomness.

    `micro_batch` samples are denoised, `decode_chunk` images decoded at a time. With `offload` latents and images wait in
    main memory. `on_step` hears of finished steps; the image encoder is used within `looking`.
    """
    drawn = randomness.prompts(epoch, sample_ids, prompts)
    shape, count, steps = policy.latent_shape, len(sample_ids), len(policy.timesteps)
    # made outside inference mode, so ordinary tensors, which the update may save for its backward pass; filled in place, once
    latents = room((count, steps + 1, *shape), policy.device, offload)
    log_probs = torch.empty(count, steps, device=policy.device)
    ref_log_probs = torch.empty(count, steps, device=policy.device) if reference else None
    with torch.inference_mode():
        texts, text_rows = encode(policy, drawn)
        for start in range(0, count, micro_batch):
            batch = slice(start, start + micro_batch)
            ids, rows = sample_ids[batch], text_rows[batch]
            x_T = send(randomness.initial_latents(epoch, ids, shape), policy.device)
            noise = lambda k, ids=ids: randomness.step_noise(epoch, k, ids, shape)
            latents[batch, 0].copy_(x_T, non_blocking=True)
            for k, x_t, transition, x_next in denoise(policy, texts, rows, x_T, noise, guidance):
                latents[batch, k + 1].copy_(x_next, non_blocking=True)
                log_probs[batch, k] = transition.log_prob(x_next)
                if ref_log_probs is not None:
                    step = torch.full((len(x_t),), k, device=x_t.device)
                    ref_log_probs[batch, k] = policy.transition(x_t, step, texts, rows, guidance, reference=True).log_prob(x_next)
                on_step(len(ids))
        if policy.device.type == "cuda" and offload:
            torch.cuda.current_stream(policy.device).synchronize()  # copies to main memory are under way until now
        images = _decoded(policy, latents, decode_chunk, offload)
    image_embeds = values = None
    if critic is not None and encoder is not None:
        with looking:
            image_embeds, values = _look(policy, critic, encoder, latents, decode_chunk)
    return Trajectory(
        epoch=epoch,
        prompts=tuple(drawn),
        prompt_keys=_normal_forms(policy, drawn),
        sample_ids=torch.as_tensor(list(sample_ids), dtype=torch.int64),
        texts=texts.clone(),
        text_rows=text_rows.clone(),
        steps=torch.arange(steps),
        latents=latents,
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        image_embeds=image_embeds,
        values=values,
        images=images.clone(),
    )


def _decoded(policy: Policy, latents: Tensor, chunk: int, offload: bool) -> Tensor:
    """The final images [B,3,H,W], a chunk at a time; in main memory if they are to be offloaded."""
    parts = (policy.decode(part) for part in latents[:, -1].split(chunk))
    return torch.cat([part.cpu() if offload else part for part in parts])


def _look(policy: Policy, critic: Critic, encoder: ImageEncoder, latents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """What the critic sees of, and says to, the state before every step; the final latent is not looked at.

    After the denoising loop and in chunks: sampling does not need the values.
    """
    samples, states = latents.shape[:2]
    pairs = torch.arange(samples * (states - 1), device=latents.device)  # rows of a chunk are gathered, never a second copy of all
    with torch.inference_mode():
        parts = (latents[part // (states - 1), part % (states - 1)] for part in pairs.split(chunk))
        embeds = torch.cat([encoder(policy.decode(send(part, policy.device))) for part in parts])
        values = critic(embeds)
    return embeds.clone().unflatten(0, (samples, states - 1)), values.clone().unflatten(0, (samples, states - 1))


def _normal_forms(policy: Policy, prompts: Sequence[str]) -> tuple[str, ...]:
    form = {prompt: policy.normal_form(prompt) for prompt in set(prompts)}
    return tuple(form[prompt] for prompt in prompts)
