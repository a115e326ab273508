"""A stand-in of the official training loop, written from its description, over the same networks, prompts and noise as tdpo's.

Its mathematics is tdpo's; its ways are the official ones: micro-batches of one with accumulation, a decode, a PIL
preprocessing per image and an encoder call at every denoising step, coefficients gathered on the CPU at every call, gradients
exchanged at every micro-step. Each way can be switched to the faster one alone (`Ways`), which makes the ladder of gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from setup import Bench
from torch import Tensor

from tdpo_cli.algorithms.critic import DROPOUT, WIDTHS
from tdpo_cli.train.losses import critic_loss, policy_loss
from tdpo_cli.types import Conditioning, Credit, ShufflePlan, Trajectory


@dataclass(frozen=True)
class Ways:
    """The official ways, but for attention: the stand-in that ratios are quoted against has SDPA."""

    materialised_attention: bool = False  # the whole attention matrix, as the official LoRA processor
    deferred_look: bool = False  # the critic's view after the denoising loop, in chunks
    device_pixels: bool = False  # preprocessing on the device instead of PIL, image by image
    cpu_coefficients: bool = True  # the schedule is indexed on the CPU at every call
    sample_batch: int = 8
    micro_batch: int = 1
    chunk: int = 8  # images per VAE and encoder call


OFFICIAL = Ways()


@dataclass
class Trained:
    updates: int
    first_gradient: Tensor  # of the policy at the first optimizer step, flat
    ratio_drift: float  # largest |log ratio| of the first optimizer step


def attention(bench: Bench, materialised: bool) -> None:
    bench.policy.unet.set_attn_processor(AttnProcessor() if materialised else AttnProcessor2_0())


# --- one denoising step -----------------------------------------------------------------------------------------------
class Schedule:
    """The DDIM coefficients, kept on the CPU as diffusers' scheduler keeps them."""

    def __init__(self, bench: Bench):
        schedule = bench.policy.schedule.to("cpu")
        self.timesteps, self.abar, self.abar_prev, self.sigma = schedule.timesteps, schedule.abar, schedule.abar_prev, schedule.sigma
        self.device, self.clip = bench.device, schedule.clip_sample_range
        self.on_device = {name: getattr(schedule, name).to(bench.device) for name in ("abar", "abar_prev", "sigma")}

    def gather(self, name: str, k: Tensor, on_cpu: bool) -> Tensor:
        rows = getattr(self, name).gather(0, k.cpu()).to(self.device) if on_cpu else self.on_device[name][k]
        return rows.view(-1, 1, 1, 1)

    def step(self, prediction: Tensor, x_t: Tensor, k: Tensor, on_cpu: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """mean and standard deviation of p(x_{t-1} | x_t)."""
        abar, abar_prev, sigma = (self.gather(name, k, on_cpu).to(dtype) for name in ("abar", "abar_prev", "sigma"))
        prediction, x_t = prediction.to(dtype), x_t.to(dtype)
        x_0 = (x_t - (1 - abar) ** 0.5 * prediction) / abar**0.5
        if self.clip is not None:
            x_0 = x_0.clamp(-self.clip, self.clip)
        return abar_prev**0.5 * x_0 + (1 - abar_prev - sigma**2).clamp(min=0) ** 0.5 * prediction, sigma


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    density = -((x.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=(1, 2, 3))


def predict(bench: Bench, x_t: Tensor, k: Tensor, embeds: Tensor, guidance: float, unet: torch.nn.Module | None = None) -> Tensor:
    unet, t = unet or bench.policy.unet, bench.policy.timesteps[k]
    negative = bench.policy._negative.expand(len(x_t), -1, -1)
    both = torch.cat([x_t, x_t]).to(unet.dtype), torch.cat([t, t]), torch.cat([negative, embeds]).to(unet.dtype)
    unconditional, conditional = unet(both[0], both[1], encoder_hidden_states=both[2], return_dict=False)[0].chunk(2)
    return unconditional + guidance * (conditional - unconditional)


# --- sampling ---------------------------------------------------------------------------------------------------------
def look(bench: Bench, latents: Tensor, ways: Ways) -> Tensor:
    """The critic's embedding of decode(latents). [b,E]"""
    images = bench.policy.decode(latents)
    if ways.device_pixels:
        return bench.encoder(images)
    size, pixels = bench.encoder.image_size, []
    for image in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        picture = Image.fromarray(image)
        scale = size / min(picture.size)
        picture = picture.resize((max(size, int(picture.width * scale)), max(size, int(picture.height * scale))), Image.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        values = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
        pixels.append((values - np.float32(bench.encoder.mean)) / np.float32(bench.encoder.std))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(bench.device)
    return torch.nn.functional.normalize(bench.encoder._encode(stacked).float(), dim=-1)


@torch.no_grad()
def sample(bench: Bench, ways: Ways, epoch: int = 0) -> Trajectory:
    """One epoch's samples, as tdpo's rollout gives them."""
    schedule, guidance, count = Schedule(bench), bench.preset.rollout.guidance_scale, bench.size.samples
    drawn = bench.randomness.prompts(epoch, range(count), bench.prompts)
    latents, log_probs, embeds_seen, images, texts = [], [], [], [], []
    for start in range(0, count, ways.sample_batch):
        ids = range(start, min(start + ways.sample_batch, count))
        embeds = bench.policy.encode([drawn[i] for i in ids]).parts["embeds"][:-1]
        x = bench.randomness.initial_latents(epoch, ids, bench.policy.latent_shape).to(bench.device)
        states, densities, seen = [x], [], []
        for step in range(bench.size.steps):
            if not ways.deferred_look:
                seen.append(look(bench, x, ways))
            k = torch.full((len(x),), step, device=bench.device)
            mean, std = schedule.step(predict(bench, x, k, embeds, guidance), x, k, ways.cpu_coefficients)
            x = mean + std * bench.randomness.step_noise(epoch, step, ids, bench.policy.latent_shape).to(bench.device)
            states.append(x)
            densities.append(log_prob(x, mean, std))
        if ways.deferred_look:
            flat = torch.stack(states[:-1], 1).flatten(0, 1)
            seen = list(torch.cat([look(bench, part, ways) for part in flat.split(ways.chunk)]).unflatten(0, (len(x), -1)).unbind(1))
        latents.append(torch.stack(states, 1))
        log_probs.append(torch.stack(densities, 1))
        embeds_seen.append(torch.stack(seen, 1))
        images.append(bench.policy.decode(x))
        texts.append(embeds)
    image_embeds = torch.cat(embeds_seen)
    return Trajectory(
        epoch, tuple(drawn), tuple(drawn), torch.arange(count), Conditioning({"embeds": torch.cat(texts)}), torch.arange(count, device=bench.device),
        torch.arange(bench.size.steps), torch.cat(latents), torch.cat(log_probs), None, image_embeds, bench.critic(image_embeds), torch.cat(images),
    )  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------
def train(
    bench: Bench,
    ways: Ways,
    trajectory: Trajectory,
    credit: Credit,
    plan: ShufflePlan,
    tamper: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Trained:
    """One inner epoch. `tamper` may spoil the gradient: the benchmark must notice."""
    settings, guidance, schedule = bench.preset.update, bench.preset.rollout.guidance_scale, Schedule(bench)
    adam = dict(betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon, weight_decay=settings.adam_weight_decay)
    policy_weights, critic_weights = list(bench.policy.trainable.values()), list(bench.critic.parameters())
    optimizers = (
        torch.optim.AdamW(policy_weights, lr=settings.learning_rate, **adam),
        torch.optim.AdamW(critic_weights, lr=settings.critic_learning_rate, **adam),
    )
    half = bench.policy.unet.dtype == torch.float16
    scaler = torch.amp.GradScaler(bench.device.type, enabled=half and bench.device.type != "cpu")
    for weight in (*policy_weights, *critic_weights):
        weight.grad = None
    updates, first, drift = 0, None, 0.0
    advantages, returns = credit.advantages.to(bench.device), credit.returns.to(bench.device)
    for index, (samples, steps) in enumerate(plan.optimizer_steps(settings.batch_size, False)):
        masks = bench.randomness.keep_masks(trajectory.epoch, 0, index, len(samples), WIDTHS[: len(DROPOUT)], DROPOUT)
        for start in range(0, len(samples), ways.micro_batch):
            rows = slice(start, start + ways.micro_batch)
            sample_, k = samples[rows].to(bench.device), steps[rows].to(bench.device)
            x_t, x_next = trajectory.latents[sample_, k], trajectory.latents[sample_, k + 1]
            embeds = trajectory.texts[trajectory.text_rows[sample_]].parts["embeds"]
            mean, std = schedule.step(predict(bench, x_t, k, embeds, guidance), x_t, k, ways.cpu_coefficients)
            log_ratio = log_prob(x_next, mean, std) - trajectory.log_probs[sample_, k]
            losses, _ = policy_loss(log_ratio.exp(), advantages[sample_, k], settings.clip_range)
            values = bench.critic(trajectory.image_embeds[sample_, k], [mask[rows].to(bench.device) for mask in masks])
            critic_losses, _ = critic_loss(values, trajectory.values[sample_, k], returns[sample_, k], settings.clip_range_critic)
            share = len(sample_) / len(samples)
            (scaler.scale(losses.mean() * share) + bench.preset.algorithm.critic_coef * critic_losses.mean() * share).backward()
            _exchange(policy_weights, critic_weights)
            if index == 0:
                drift = max(drift, log_ratio.abs().max().item())
        scaler.unscale_(optimizers[0])
        if index == 0:
            first = tamper(torch.cat([weight.grad.flatten() for weight in policy_weights]).clone())
        torch.nn.utils.clip_grad_norm_(policy_weights, settings.max_grad_norm)
        torch.nn.utils.clip_grad_norm_(critic_weights, settings.max_grad_norm)
        scaler.step(optimizers[0])
        optimizers[1].step()
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        updates += 1
    return Trained(updates, first, drift)


def _exchange(*networks: list[torch.nn.Parameter]) -> None:
    """At every micro-step, as the official `accumulate` of a tuple does; with one process there is nothing to exchange."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for weights in networks:
            flat = torch.cat([weight.grad.flatten() for weight in weights])
            torch.distributed.all_reduce(flat)  # its time is what counts here: the sum itself is made once, at the optimizer step
