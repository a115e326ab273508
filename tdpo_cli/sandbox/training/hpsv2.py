"""Train a small open_clip CLIP on captions, then on preferences, and write it as HPS v2 is published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor

from tdpo_cli.sandbox.training.clip import MEAN, STD, captioned, contrastive_loss, pixels
from tdpo_cli.sandbox.training.common import cosine_schedule, steps
from tdpo_cli.sandbox.training.preferences import Scorer, judge, make_pairs, preference_loss
from tdpo_cli.sandbox.world import CANVAS

CAPTION_STEPS = 500
CAPTION_BATCH = 128
CAPTION_LEARNING_RATE = 2e-3
PAIRS = 2_400
AGREEMENT = 0.9
WRONG = 0.4
EPOCHS = 4
BATCH = 48
LEARNING_RATE = 4e-4
CONTRAST = 0.1  # weight of the caption task while preferences are learned
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": CANVAS, "layers": 3, "width": 64, "head_width": 16, "patch_size": 4, "mlp_ratio": 3.0},
    # the published byte-pair vocabulary makes the embedding table the largest part: keep it narrow
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
CHECKPOINT_FILE, CONFIG_FILE = "HPS_v2_compressed.pt", "open_clip_config.json"


def build_hpsv2(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed + 30)
    generator = torch.Generator().manual_seed(seed + 30)
    tokenizer = SimpleTokenizer()
    model = CLIP(**MODEL)
    learn_captions(model, tokenizer, generator)
    pairs = make_pairs(zoo, seed + 31, PAIRS, AGREEMENT, WRONG)
    ids = tokenizer(pairs.prompts)
    total = EPOCHS * (PAIRS // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = cosine_schedule(optimizer, total)
    for step in steps("hpsv2", total):
        if step % (PAIRS // BATCH) == 0:
            order = torch.randperm(PAIRS, generator=generator).split(BATCH)
        rows = order[step % (PAIRS // BATCH)]
        text = model.encode_text(ids[rows], normalize=True)
        seen = model.encode_image(pixels(torch.cat([pairs.first[rows], pairs.second[rows]])), normalize=True)
        logits = model.logit_scale.exp() * (torch.cat([text, text]) * seen).sum(-1)
        images, texts = captioned(generator, BATCH)
        loss = preference_loss(*logits.chunk(2), pairs.label[rows])
        loss = loss + CONTRAST * contrastive_loss(caption_logits(model, tokenizer, images, texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    save(model, zoo / "hpsv2")
    return judge(load_scorer(zoo), make_pairs(zoo, seed + 32, 400, AGREEMENT, WRONG))


def learn_captions(model: CLIP, tokenizer: SimpleTokenizer, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=CAPTION_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = cosine_schedule(optimizer, CAPTION_STEPS)
    for _ in steps("hpsv2 words", CAPTION_STEPS):
        loss = contrastive_loss(caption_logits(model, tokenizer, *captioned(generator, CAPTION_BATCH)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.0)


def caption_logits(model: CLIP, tokenizer: SimpleTokenizer, images: Tensor, texts: list[str]) -> Tensor:
    """Scaled cosines of every picture with every text, [b, b]."""
    seen = model.encode_image(pixels(images), normalize=True)
    return model.logit_scale.exp() * seen @ model.encode_text(tokenizer(texts), normalize=True).T


def save(model: CLIP, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() for name, value in model.state_dict().items() if name != "attn_mask"}
    torch.save({"state_dict": state}, folder / CHECKPOINT_FILE)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_scorer(zoo: Path) -> Scorer:
    """The cosine of prompt and picture."""
    model = CLIP(**json.loads((zoo / "hpsv2" / CONFIG_FILE).read_text())["model_cfg"])
    state = torch.load(zoo / "hpsv2" / CHECKPOINT_FILE, weights_only=True)["state_dict"]
    model.load_state_dict({name: value.float() for name, value in state.items()})
    model.eval()
    tokenizer = SimpleTokenizer()

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        text = model.encode_text(tokenizer(prompts), normalize=True)
        return (text * model.encode_image(pixels(images), normalize=True)).sum(-1)

    return score
