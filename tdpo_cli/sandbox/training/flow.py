"""Train the transformer with rectified flow on cached latents, and assemble the StableDiffusion3Pipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from tdpo_cli.models.zero_tokens import merge_zeros
from tdpo_cli.sampling import grid
from tdpo_cli.sandbox.training.common import Average, cosine_schedule, save_half, steps
from tdpo_cli.sandbox.training.tokenizer import CONTEXT, write_tokenizer
from tdpo_cli.sandbox.training.unet import cache_latents, check_prompts, judged
from tdpo_cli.sandbox.training.vae import measure
from tdpo_cli.sandbox.world import all_prompts, held_out_prompts, quickstart_prompts

STEPS = 5_000
BATCH = 64
LEARNING_RATE = 2e-3
EMPTY_SHARE = 0.1  # of the captions dropped, for classifier-free guidance
FRESH_EVERY = 1_250  # steps; then other scenes are drawn and encoded, and the average so far is written
SCENES = 12_288  # cached at a time
SHIFT = 1.5  # of the times in training and of the scheduler: what the picture shows is decided at high noise
ZEROS = (77, 128, 256)  # tokens of zeros in T5's place: the pictures shall not depend on their number
TEXT_TOWERS = ("aesthetic", "pickscore")  # folders of the CLIPs whose text towers serve, frozen


def build_flow(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    folder = zoo / "flow"
    write_text_encoders(zoo)
    vae = shifted_vae(zoo)
    save_half(vae, folder / "vae")
    pipeline = assemble(folder, new_transformer(), vae)
    vocabulary, pooled = encode_prompts(pipeline)  # [337, 16, 128], [337, 192]

    transformer = pipeline.transformer
    average = Average(transformer, decay=0.999)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = cosine_schedule(optimizer, STEPS, warmup=200)
    prompt_index = {prompt: i for i, prompt in enumerate(all_prompts())}
    for step in steps("flow", STEPS, every=250):
        if step % FRESH_EVERY == 0:
            save_average(folder, transformer, average)
            mean, std, which = cache_latents(vae, prompt_index, generator)
            mean = mean - vae.config.shift_factor * vae.config.scaling_factor
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        words = which[rows].where(torch.rand(BATCH, generator=generator) >= EMPTY_SHARE, len(prompt_index))
        texts = F.pad(vocabulary[words], (0, 0, 0, ZEROS[step % len(ZEROS)]))
        loss = flow_loss(transformer, clean, texts, pooled[words], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(transformer)
    save_average(folder, transformer, average)
    return check_flow(zoo)


def flow_loss(transformer: nn.Module, clean: Tensor, texts: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity noise - clean at x = (1 - sigma) clean + sigma noise."""
    noise = torch.randn(clean.shape, generator=generator)
    u = (torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)) / len(clean)  # stratified
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    at = sigma.view(-1, 1, 1, 1)
    x = torch.lerp(clean, noise, at)
    velocity = transformer(x, encoder_hidden_states=texts, pooled_projections=pooled, timestep=1000 * sigma).sample
    return F.mse_loss(velocity, noise - clean)


# --- the parts ----------------------------------------------------------------------------------------------------------------
def new_transformer() -> SD3Transformer2DModel:
    """As SD 3.5's, small: every block begins as the identity and the whole as zero, which trains faster than diffusers' start."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,  # the two text towers side by side
        caption_projection_dim=96,
        pooled_projection_dim=192,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        modulations = (block.norm1.linear, block.norm1_context.linear)
        for layer in modulations:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def write_text_encoders(zoo: Path) -> None:
    """Two different text towers with their projections; the second tokenizer pads with "!", as the published ones do."""
    for suffix, tower, pad in zip(("", "_2"), TEXT_TOWERS, (None, "!"), strict=True):
        tokenizer = write_tokenizer(zoo / "flow" / f"tokenizer{suffix}", pad)
        clip = CLIPModel.from_pretrained(zoo / tower, local_files_only=True).float()
        config = CLIPTextConfig(**{**clip.config.text_config.to_dict(), "pad_token_id": tokenizer.pad_token_id})
        encoder = CLIPTextModelWithProjection(config)
        encoder.text_model.load_state_dict(clip.text_model.state_dict())
        encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
        save_half(encoder, zoo / "flow" / f"text_encoder{suffix}")


def shifted_vae(zoo: Path) -> AutoencoderKL:
    """The autoencoder of the other pipeline, with the shift that SD 3's has beside its scale: the latents' mean."""
    vae = AutoencoderKL.from_pretrained(zoo / "pipeline" / "vae", dtype=torch.float32, local_files_only=True).eval()
    mean = measure(vae, torch.Generator().manual_seed(1))["latent_mean"]
    vae.register_to_config(shift_factor=mean)
    return vae


def assemble(folder: Path, transformer: SD3Transformer2DModel, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Write transformer/, scheduler/ and model_index.json beside the parts that are there; the pipeline of them all."""
    save_half(transformer, folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.save_pretrained(folder / "scheduler")
    tower = lambda name: CLIPTextModelWithProjection.from_pretrained(folder / name, local_files_only=True).float().eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=tower("text_encoder"),
        tokenizer=write_tokenizer(folder / "tokenizer"),
        text_encoder_2=tower("text_encoder_2"),
        tokenizer_2=write_tokenizer(folder / "tokenizer_2", "!"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_config(folder)
    merge_zeros(transformer, CONTEXT)
    return pipeline


def save_average(folder: Path, transformer: SD3Transformer2DModel, average: Average) -> None:
    averaged = SD3Transformer2DModel.from_config(transformer.config)
    averaged.load_state_dict(average.weights)
    save_half(averaged, folder / "transformer")


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusion3Pipeline) -> tuple[Tensor, Tensor]:
    """Token states of every prompt, then of the empty one, without zeros, [337, 16, 128], and pooled ones [337, 192]."""
    prompts = [*all_prompts(), ""]
    states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1)
    return states[:, :CONTEXT], pooled


# --- what came of it -----------------------------------------------------------------------------------------------------------
def load_flow(zoo: Path) -> StableDiffusion3Pipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers asks for them, although model_index.json says null
    pipeline = StableDiffusion3Pipeline.from_pretrained(zoo / "flow", **absent, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_flow(pipeline: StableDiffusion3Pipeline, prompts: list[str], seed: int, inference_steps: int = 20, guidance: float = 3.0) -> Tensor:
    """Pictures of the prompts by the pipeline's own deterministic Euler steps, [n, 3, 32, 32] in [0, 1]."""
    settings = {"num_inference_steps": inference_steps, "guidance_scale": guidance, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    batches = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    return torch.cat([pipeline(batch, generator=generator, **settings).images for batch in batches])


def check_flow(zoo: Path, n: int = 256, seed: int = 0) -> dict:
    """What gold says of n samples of the flow pipeline: 20 Euler steps, guidance 3."""
    prompts = check_prompts(n, seed)
    return judged(sample_flow(load_flow(zoo), prompts, seed), prompts)


def contact_sheet(zoo: Path, file: Path, seeds: int = 6) -> None:
    """Draw the quickstart's prompts and held-out ones, each with some seeds: one row a prompt."""
    prompts = [*quickstart_prompts(), *held_out_prompts()[::8]]
    pipeline = load_flow(zoo)
    drawn = torch.stack([sample_flow(pipeline, prompts, seed) for seed in range(seeds)], dim=1)
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    images = [grid.to_pil(image) for image in drawn.flatten(0, 1)]
    title = f"sandbox-flow: 20 Euler steps, guidance 3, seeds 0 to {seeds - 1}"
    grid.draw(images, repeated, seeds, title).save(file, optimize=True)
