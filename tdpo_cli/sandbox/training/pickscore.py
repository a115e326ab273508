"""Fine-tune a copy of the CLIP on preferences between two pictures of one prompt, as PickScore was."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tdpo_cli.sandbox.training.clip import contrastive_loss, pixels, save_clip, tokens
from tdpo_cli.sandbox.training.common import cosine_schedule, steps
from tdpo_cli.sandbox.training.preferences import Scorer, judge, make_pairs, preference_loss

PAIRS = 2_400
AGREEMENT = 0.85
WRONG = 0.3
EPOCHS = 6
BATCH = 48
LEARNING_RATE = 4e-4
CONTRAST = 0.1  # weight of telling the batch's prompts apart, so that scores stay comparable between prompts


def build_pickscore(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed + 20)
    generator = torch.Generator().manual_seed(seed + 20)
    folder = zoo / "pickscore"
    copy_tokenizer(zoo / "aesthetic", folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    clip = gelu_copy(zoo / "aesthetic")
    pairs = make_pairs(zoo, seed + 21, PAIRS, AGREEMENT, WRONG)
    ids = tokens(tokenizer, pairs.prompts)
    total = EPOCHS * (PAIRS // BATCH)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = cosine_schedule(optimizer, total)
    for step in steps("pickscore", total):
        if step % (PAIRS // BATCH) == 0:
            order = torch.randperm(PAIRS, generator=generator).split(BATCH)
        rows = order[step % (PAIRS // BATCH)]
        text, first, second = features(clip, ids[rows], pairs.first[rows], pairs.second[rows])
        scale = clip.logit_scale.exp()
        loss = preference_loss(scale * (text * first).sum(-1), scale * (text * second).sum(-1), pairs.label[rows])
        better = torch.where(pairs.label[rows].bool().unsqueeze(1), first, second)
        loss = loss + CONTRAST * contrastive_loss(scale * better @ text.T)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    save_clip(clip, folder)
    return judge(load_scorer(zoo), make_pairs(zoo, seed + 22, 400, AGREEMENT, WRONG))


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)


def gelu_copy(source: Path) -> CLIPModel:
    """The same weights under exact GELU, the activation of PickScore's kind of CLIP; fine-tuning absorbs the change."""
    original = CLIPModel.from_pretrained(source, local_files_only=True).float()
    values = original.config.to_dict()
    values["text_config"]["hidden_act"] = values["vision_config"]["hidden_act"] = "gelu"
    clip = CLIPModel(CLIPConfig(**values))
    clip.load_state_dict(original.state_dict())
    return clip


def features(clip: CLIPModel, ids: Tensor, *images: Tensor) -> list[Tensor]:
    """L2-normalised embeddings of the texts and of each batch of pictures, all [b, 96]."""
    text = clip.text_projection(clip.text_model(ids).pooler_output)
    seen = clip.visual_projection(clip.vision_model(pixels(torch.cat(images))).pooler_output).chunk(len(images))
    return [F.normalize(part, dim=-1) for part in (text, *seen)]


def load_scorer(zoo: Path) -> Scorer:
    """The cosine of prompt and picture."""
    clip = CLIPModel.from_pretrained(zoo / "pickscore", local_files_only=True).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(zoo / "pickscore", local_files_only=True)

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        text, seen = features(clip, tokens(tokenizer, prompts), images)
        return (text * seen).sum(-1)

    return score
