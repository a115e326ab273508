"""The denoising loop, and images of prompts without keeping the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tdpo_cli.machine.transfer import send
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Conditioning, Transition


def denoise(
    policy: Policy, texts: Conditioning, rows: Tensor, x_T: Tensor, noise: Callable[[int], Tensor], guidance: float
) -> Iterator[tuple[int, Tensor, Transition, Tensor]]:
    """The chain from pure noise to the final latent: yields (k, x before step k, its transition, x after)."""
    x_t = x_T
    for k in range(len(policy.timesteps)):
        step = torch.full((len(x_t),), k, device=x_t.device)
        transition = policy.transition(x_t, step, texts, rows, guidance)
        # drawn while a GPU still computes the transition
        x_next = transition.sample(send(noise(k), x_t.device))
        yield k, x_t, transition, x_next
        x_t = x_next


def encode(policy: Policy, prompts: Sequence[str]) -> tuple[Conditioning, Tensor]:
    """Encode each distinct prompt once. -> a row per distinct prompt, the negative prompt last; and each prompt's row [b]"""
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    return policy.encode(list(distinct)), torch.tensor([distinct[prompt] for prompt in prompts], device=policy.device)


def generate(
    policy: Policy,
    prompts: Sequence[str],
    sample_ids: Sequence[int],
    randomness: Randomness,
    guidance: float,
    batch_size: int,
    on_step: Callable[[int], None] = lambda samples: None,
    decode_chunk: int | None = None,
) -> Iterator[Tensor]:
    """Images of prompts, a batch at a time. Noise depends on (randomness, sample id) only. Yields [b,3,H,W] in [0,1]."""
    noisy = (policy.sampler.std > 0).tolist()  # where a step has no noise, none is drawn
    for start in range(0, len(prompts), batch_size):
        ids = sample_ids[start : start + batch_size]
        with torch.inference_mode():
            texts, rows = encode(policy, prompts[start : start + batch_size])
            x_T = randomness.initial_latents(0, ids, policy.latent_shape).to(policy.device)
            noise = lambda k, ids=ids: randomness.step_noise(0, k, ids, policy.latent_shape) if noisy[k] else torch.zeros(1)
            for *_, x_0 in denoise(policy, texts, rows, x_T, noise, guidance):  # noqa: B007 - the last one is decoded
                on_step(len(ids))
            images = torch.cat([policy.decode(chunk) for chunk in x_0.split(decode_chunk or len(ids))])
        yield images.clone()
