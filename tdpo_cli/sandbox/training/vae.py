"""Train the autoencoder: 32 x 32 pictures to 8 x 8 x 4 latents and back."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tdpo_cli.sandbox.training.common import cosine_schedule, save_half, signed, steps, wide_scenes
from tdpo_cli.sandbox.world import render, sample_scenes

STEPS = 1900
BATCH = 32
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-4  # per latent element against squared error per pixel; below the ELBO's 7e-4, for sharpness


def build_vae(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, STEPS)
    for _ in steps("vae", STEPS):
        images = signed(render(wide_scenes(generator, BATCH))).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + 0.05 * error.abs().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    vae.eval()
    figures = measure(vae, torch.Generator().manual_seed(seed + 1))
    vae.register_to_config(scaling_factor=round(1 / figures["latent_std"], 5))
    save_half(vae, zoo / "pipeline" / "vae")
    return figures


@torch.no_grad()
def measure(vae: AutoencoderKL, generator: torch.Generator, n: int = 512) -> dict:
    """Fidelity of reconstruction, and the latents' spread, on sampled scenes."""
    images = signed(render(sample_scenes(generator, n)))
    latents = vae.encode(images).latent_dist.mode()
    errors = (vae.decode(latents).sample.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4  # of [0, 1]
    return {
        "psnr_db": round(float(-10 * errors.log10().mean()), 2),
        "latent_std": round(float(latents.std()), 5),
        "latent_mean": round(float(latents.mean()), 5),
    }
