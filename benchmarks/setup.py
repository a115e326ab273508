"""What is timed: a small or a full-size policy with critic, encoder and reward, the same for the stand-in and for tdpo."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.models import adapter
from tdpo_cli.models.families.sd import StableDiffusion
from tdpo_cli.models.loading import DTYPES
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards.backbones import ImageEncoder
from tdpo_cli.rewards.networks import FrozenImageEncoder
from tdpo_cli.rewards.preprocess import OPENAI_MEAN, OPENAI_STD

SCHEDULER = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much work an epoch is. The official per-GPU batches are 8 while sampling, 1 x 16 accumulated while training."""

    name: str
    samples: int
    steps: int
    batch: int  # samples per optimizer step
    width: int | None = None  # None: the sandbox; else the UNet's narrowest level (320 is Stable Diffusion 1.x)
    latent: int = 8


SIZES = {
    "tiny": Size("tiny", samples=32, steps=5, batch=16),
    "sd1": Size("sd1", samples=32, steps=50, batch=16, width=320, latent=64),
    "sd1-small": Size("sd1-small", samples=4, steps=2, batch=2, width=32, latent=8),  # sd1's code on a CPU
}


@dataclass
class Bench:
    """One set of networks; `restart` takes the trained weights back to where they began."""

    size: Size
    preset: Preset
    policy: Policy
    encoder: ImageEncoder
    critic: Critic
    reward: Any
    prompts: list[str]
    randomness: Randomness
    device: torch.device

    def __post_init__(self) -> None:
        if self.device.type != "meta":
            self.remember()

    def remember(self) -> None:
        self._start = self.policy.state_dict(), {name: value.clone() for name, value in self.critic.state_dict().items()}

    def restart(self) -> None:
        self.policy.load_state_dict(self._start[0])
        self.critic.load_state_dict(self._start[1])

    @property
    def networks(self) -> list[nn.Module]:
        return [self.policy.family.network, self.policy.family.pipeline.vae, self.policy.family.pipeline.text_encoder, self.critic]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def build(size: Size, device: torch.device, dtype: str = "fp16") -> Bench:
    """Networks of that size: the sandbox's, or Stable Diffusion 1.x with random weights. `meta` is a dry construction."""
    overrides = [
        ("rollout.samples_per_epoch", size.samples), ("rollout.steps", size.steps), ("update.batch_size", size.batch),
        ("reward.watch", []), ("run.preview_images", 0),
    ]  # fmt: skip
    if size.width is None:
        preset = presets.load("quickstart", overrides)
        from tdpo_cli.machine.memory import Plan
        from tdpo_cli.machine.world import World
        from tdpo_cli.train.state import build as build_job

        job = build_job(preset, World(device=device), Plan.of(size.samples))
        bench = Bench(size, preset, job.policy, job.encoder, job.critic, job.rewards[preset.reward.train], job.prompts, job.randomness, device)
    else:
        preset = presets.load("aesthetic", [*overrides, ("model.dtype", dtype)])
        bench = _stable_diffusion(size, preset, device, DTYPES[dtype] if device.type != "cpu" else torch.float32)
    if device.type != "meta":
        with torch.no_grad():  # an adapter of zeros has no gradient in its first half
            draw = torch.Generator().manual_seed(1)
            for name, parameter in bench.policy.trainable.items():
                if "lora_B" in name:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=draw))
        bench.remember()
    return bench


def _stable_diffusion(size: Size, preset: Preset, device: torch.device, dtype: torch.dtype) -> Bench:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    wide, full = size.width, size.width == 320
    text_width, vae_width, groups = (768, 128, 32) if full else (64, 16, 8)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=size.latent, cross_attention_dim=text_width, attention_head_dim=8, norm_num_groups=groups,
            block_out_channels=(wide, 2 * wide, 4 * wide, 4 * wide),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
            layers_per_block=2, latent_channels=4, norm_num_groups=groups,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=8 * size.latent,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=12 if full else 2, num_attention_heads=text_width // 64
            )
        )
        encoder = RandomClip(full)
    for network in (unet, vae, text):
        network.requires_grad_(False).eval().to(dtype)
    encoder.requires_grad_(False).eval()
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
        unet.to(memory_format=torch.channels_last)
    pipeline = StableDiffusionPipeline(vae, text, Hashed(), unet, DDIMScheduler(), None, None, requires_safety_checker=False)
    family, randomness = StableDiffusion(pipeline, SCHEDULER, device, None), Randomness(preset.run.seed)
    policy = Policy(family, adapter.attach(unet, preset.model.lora_rank, family.lora_targets, randomness.initial_weights("lora")))
    if device.type != "meta":
        policy.set_schedule(preset.rollout.steps, preset.rollout.eta)
    critic = Critic(encoder.embed_dim, preset.algorithm.critic_init_std)
    if device.type != "meta":
        critic.initialise(randomness.initial_weights("critic"))
    critic.to(device)
    return Bench(size, preset, policy, encoder, critic, FirstNumber(encoder), [f"animal {i}" for i in range(45)], randomness, device)


class Hashed:
    """A tokenizer without a vocabulary: words by their checksum."""

    model_max_length = 77
    added_tokens_encoder: dict[str, int] = {}  # no textual inversion

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        rows = [[49406, *(zlib.crc32(word.encode()) % 49000 for word in text.split())][:76] for text in texts]
        self.input_ids = torch.tensor([row + [49407] * (77 - len(row)) for row in rows])
        return self

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def decode(self, ids: Tensor, **options: Any) -> str:
        return " ".join(map(str, ids.tolist()))


class RandomClip(FrozenImageEncoder):
    """CLIP's ViT-L/14, or a small one, with random weights, behind the product's own preprocessing; fp32."""

    mean, std = OPENAI_MEAN, OPENAI_STD

    def __init__(self, full: bool):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        small = dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=64
        )
        large = dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=14, projection_dim=768
        )
        config = CLIPVisionConfig(**(large if full else small))
        self.model = CLIPVisionModelWithProjection(config)
        self.embed_dim, self.image_size = config.projection_dim, config.image_size

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).image_embeds


class FirstNumber:
    """A reward of one encoder call."""

    name, needs_prompt = "first-number", False

    def __init__(self, encoder: RandomClip):
        self.encoder = encoder

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.encoder(images)[:, 0]
