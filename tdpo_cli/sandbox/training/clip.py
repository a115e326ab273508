"""Train the small CLIP on captions with size and position words; its text tower also serves the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tdpo_cli.sandbox.training.common import cosine_schedule, save_half, steps, wide_scenes
from tdpo_cli.sandbox.training.tokenizer import CONTEXT, write_tokenizer
from tdpo_cli.sandbox.world import CANVAS, caption, render, sample_scenes, short_captions

STEPS = 700
BATCH = 160
LEARNING_RATE = 1.5e-3
SHORT_SHARE = 0.3  # of the captions without size and position words, as prompts are
MEAN = (0.48145466, 0.4578275, 0.40821073)  # the pixel statistics of every published CLIP
STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = write_tokenizer(zoo / "aesthetic")
    clip = CLIPModel(clip_config(tokenizer))
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = cosine_schedule(optimizer, STEPS)
    for _ in steps("clip", STEPS, every=50):
        images, texts = captioned(generator, BATCH)
        loss = contrastive_loss(clip(input_ids=tokens(tokenizer, texts), pixel_values=pixels(images)).logits_per_image)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=4.0)
    clip.eval()
    save_clip(clip, zoo / "aesthetic")
    write_tokenizer(zoo / "pipeline" / "tokenizer")
    save_half(text_tower(clip), zoo / "pipeline" / "text_encoder")
    return measure(clip, tokenizer, torch.Generator().manual_seed(seed + 1))


def clip_config(tokenizer: CLIPTokenizer, hidden_act: str = "quick_gelu") -> CLIPConfig:
    width = {"hidden_size": 64, "num_attention_heads": 4, "hidden_act": hidden_act, "projection_dim": 96}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        # explicit ids: the defaults belong to the 49,408 words of the published models
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": CANVAS, "patch_size": 4, "num_hidden_layers": 3, "intermediate_size": 192}
    return CLIPConfig(text_config=text | width, vision_config=vision | width, projection_dim=96)


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    tower = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    source = clip.text_model.state_dict()
    target = tower.state_dict()  # whether keys start with `text_model.` depends on the version of transformers
    tower.load_state_dict({name: source[name.removeprefix("text_model.")] for name in target})
    return tower


def save_clip(clip: CLIPModel, folder: Path) -> None:
    save_half(clip, folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": CANVAS},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": CANVAS, "width": CANVAS},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[b, 16], padded with the end token."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids


def pixels(images: Tensor) -> Tensor:
    """[0, 1] -> what a CLIP sees."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def captioned(generator: torch.Generator, n: int) -> tuple[Tensor, list[str]]:
    """n worn pictures [n, 3, 32, 32] with captions, most of them long."""
    scenes = wide_scenes(generator, n, share=0.1)
    short = (torch.rand(n, generator=generator) < SHORT_SHARE).tolist()
    both = zip(short_captions(scenes), caption(scenes), strict=False)
    texts = [brief if is_short else full for (brief, full), is_short in zip(both, short, strict=False)]
    return worn(render(scenes), generator), texts


def worn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise of random strength: generated pictures are never as clean as rendered ones."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    noise = 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    return (torch.lerp(images, blurred, blur) + noise).clamp(0, 1)


def contrastive_loss(logits: Tensor) -> Tensor:
    """Each picture finds its caption and each caption its picture. [b, b] -> scalar."""
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def measure(clip: CLIPModel, tokenizer: CLIPTokenizer, generator: torch.Generator, n: int = 256) -> dict:
    scenes = sample_scenes(generator, n)
    pictures = pixels(render(scenes))
    target = torch.arange(n)
    by_long = clip(input_ids=tokens(tokenizer, caption(scenes)), pixel_values=pictures).logits_per_image
    return {"top1_of_256_long": round(float((by_long.argmax(1) == target).float().mean()), 3)}
