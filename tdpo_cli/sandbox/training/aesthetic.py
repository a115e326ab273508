"""Train the aesthetic head: a linear stack on the CLIP embedding that sees no prompt, on few and noisy preferences."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from tdpo_cli.sandbox.training.clip import pixels
from tdpo_cli.sandbox.training.common import cosine_schedule
from tdpo_cli.sandbox.training.preferences import Scorer, judge, make_pairs, preference_loss, sampled_pairs

PAIRS = 1_200  # few on purpose: the reward shall be learnable and yet over-optimisable
AGREEMENT = 0.8
APART = 0.5  # share of pairs whose pictures have different prompts
EPOCHS = 10
BATCH = 64
LEARNING_RATE = 1e-3
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class Head(nn.Module):
    """The layout of LAION's published head. No activations, as there: a linear map in five factors."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeds: Tensor) -> Tensor:
        return self.layers(embeds).squeeze(-1)


def build_aesthetic(zoo: Path, seed: int) -> dict:
    clip = load_clip(zoo)
    pairs = sampled_pairs(zoo, seed + 10, PAIRS, AGREEMENT, APART)
    first, second = embed(clip, pairs.first), embed(clip, pairs.second)
    head = train_head(first, second, pairs.label, seed)
    rescale(head, torch.cat([first, second]))
    state = {name: value.half() for name, value in head.state_dict().items()}
    torch.save(state, zoo / "aesthetic" / HEAD_FILE)

    scorer = load_scorer(zoo)
    return {
        "samples": judge(scorer, sampled_pairs(zoo, seed + 11, 400, AGREEMENT)),
        "renders": judge(scorer, make_pairs(None, seed + 12, 400, AGREEMENT)),
    }


def train_head(first: Tensor, second: Tensor, label: Tensor, seed: int) -> Head:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    head = Head(first.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, EPOCHS * (len(label) // BATCH), warmup=10)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(label), generator=generator).split(BATCH)[: len(label) // BATCH]:
            loss = preference_loss(head(first[rows]), head(second[rows]), label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


@torch.no_grad()
def rescale(head: Head, embeds: Tensor) -> None:
    """Preferences leave offset and scale open: mean 5 and deviation 1 on samples, near the published head's range."""
    scores = head(embeds)
    last = head.layers[-1]
    last.weight.div_(scores.std())
    last.bias.sub_(scores.mean()).div_(scores.std()).add_(5)


def load_clip(zoo: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(zoo / "aesthetic", local_files_only=True).float().eval()


@torch.no_grad()
def embed(clip: CLIPModel, images: Tensor) -> Tensor:
    """L2-normalised image embeddings, [b, 96]."""
    parts = [clip.visual_projection(clip.vision_model(pixels(chunk)).pooler_output) for chunk in images.split(128)]
    return F.normalize(torch.cat(parts), dim=-1)


def load_scorer(zoo: Path) -> Scorer:
    clip = load_clip(zoo)
    head = Head(clip.config.projection_dim)
    state = torch.load(zoo / "aesthetic" / HEAD_FILE, weights_only=True)
    head.load_state_dict({name: value.float() for name, value in state.items()})
    head.eval()
    return lambda images, prompts: head(embed(clip, images)).detach()
