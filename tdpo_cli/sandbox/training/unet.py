"""Train the denoiser on cached latents, and assemble the StableDiffusionPipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdpo_cli.sandbox.training.clip import tokens
from tdpo_cli.sandbox.training.common import Average, cosine_schedule, save_half, signed, steps
from tdpo_cli.sandbox.world import all_prompts, gold_terms, render, sample_scenes, short_captions

STEPS = 5_000
HORIZON = 10_000  # steps of the cosine; stopped half way, because the average already draws as well as the renderer
BATCH = 64
LEARNING_RATE = 2e-3
EMPTY_SHARE = 0.1  # of the captions dropped, for classifier-free guidance
FRESH_EVERY = 2_500  # steps; then other scenes are drawn and encoded, and the average so far is written
SCENES = 12_288  # cached at a time
NOISE_BIAS = 0.65  # timestep = 1000 * u^0.65: what the picture shows is decided at high noise


def build_unet(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    folder = zoo / "pipeline"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vocabulary = encode_prompts(folder)  # [336 + 1, 16, 64]
    prompt_index = {prompt: i for i, prompt in enumerate(all_prompts())}
    scheduler = new_scheduler()
    abar = scheduler.alphas_cumprod

    unet = new_unet(vocabulary.shape[-1])
    average = Average(unet, decay=0.999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = cosine_schedule(optimizer, HORIZON, warmup=200)
    for step in steps("unet", STEPS, every=250):
        if step % FRESH_EVERY == 0:
            if step:
                assemble(folder, unet, average, vae, scheduler)
            mean, std, which = cache_latents(vae, prompt_index, generator)
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        x_0 = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        t = (1000 * torch.rand(BATCH, generator=generator) ** NOISE_BIAS).long()
        a = abar[t].view(-1, 1, 1, 1)
        words = which[rows].where(torch.rand(BATCH, generator=generator) >= EMPTY_SHARE, len(prompt_index))
        predicted = unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, vocabulary[words]).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(unet)
    assemble(folder, unet, average, vae, scheduler)
    return check(zoo)


def new_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


@torch.no_grad()
def encode_prompts(folder: Path) -> Tensor:
    """Hidden states of every prompt, then of the empty one, [337, 16, 64]."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    return encoder(tokens(tokenizer, [*all_prompts(), ""])).last_hidden_state


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, prompt_index: dict[str, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled posterior means and deviations [n, 4, 8, 8] of fresh scenes, and their prompts' indices [n]."""
    means, stds, words = [], [], []
    for _ in range(SCENES // 256):
        scenes = sample_scenes(generator, 256)
        posterior = vae.encode(signed(render(scenes))).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        words += [prompt_index[prompt] for prompt in short_captions(scenes)]
    scale = vae.config.scaling_factor
    return torch.cat(means) * scale, torch.cat(stds) * scale, torch.tensor(words)


def assemble(folder: Path, unet: UNet2DConditionModel, average: Average, vae: AutoencoderKL, scheduler: DDIMScheduler) -> None:
    """Write unet/, scheduler/ and model_index.json beside the parts that are there."""
    averaged = UNet2DConditionModel.from_config(unet.config)
    averaged.load_state_dict(average.weights)
    save_half(averaged, folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=averaged,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_config(folder)


def load_pipeline(zoo: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(zoo / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """Pictures of the prompts at the quickstart's settings, [n, 3, 32, 32] in [0, 1]."""
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    batches = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    return torch.cat([pipeline(batch, generator=generator, **settings).images for batch in batches])


def check(zoo: Path, n: int = 256, seed: int = 0) -> dict:
    """What gold says of n samples of the pipeline: 10 DDIM steps, eta 1, guidance 3."""
    prompts = check_prompts(n, seed)
    return judged(sample(load_pipeline(zoo), prompts, seed), prompts)


def check_prompts(n: int, seed: int) -> list[str]:
    """n of all prompts, each at most once."""
    generator = torch.Generator().manual_seed(seed)
    everything = all_prompts()
    return [everything[i] for i in torch.randperm(len(everything), generator=generator)[:n].tolist()]


def judged(images: Tensor, prompts: list[str]) -> dict:
    """Means of gold's terms."""
    terms = gold_terms(images, prompts)
    names = ("fidelity", "preference", "shape", "colour", "background", "size", "centredness", "radius")
    figures = {name: round(float(terms[name].mean()), 4) for name in names}
    gold = terms["fidelity"] * terms["preference"]
    return figures | {
        "gold": round(float(gold.mean()), 4),
        "gold_std": round(float(gold.std()), 4),
        "samples": len(prompts),
    }
