"""Noisy gold preferences between two pictures, and how well a learned judge agrees with gold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_cli.sandbox.training.clip import worn
from tdpo_cli.sandbox.training.unet import load_pipeline, sample
from tdpo_cli.sandbox.world import all_prompts, gold, render, sample_scenes

Scorer = Callable[[Tensor, list[str]], Tensor]  # images [b, 3, 32, 32] in [0, 1], prompts -> [b]


@dataclass(frozen=True)
class Pairs:
    """n pairs of pictures, each of one prompt unless they were drawn apart."""

    prompts: list[str]  # n, of the first picture
    first: Tensor  # [n, 3, 32, 32] in [0, 1]
    second: Tensor  # [n, 3, 32, 32]
    gold_first: Tensor  # [n]
    gold_second: Tensor  # [n]
    label: Tensor  # [n] 1.0 where the annotator says the first is better

    def rows(self, index: Tensor) -> Pairs:
        chosen = [self.prompts[i] for i in index.tolist()]
        rest = (self.first, self.second, self.gold_first, self.gold_second, self.label)
        return Pairs(chosen, *(values[index] for values in rest))


def make_pairs(zoo: Path | None, seed: int, n: int, agreement: float, wrong: float = 0.0) -> Pairs:
    """n pairs; the annotator agrees with gold in a share of `agreement`.

    Pictures come half from the pipeline in the zoo and half from the renderer (all rendered without a zoo);
    in a share of `wrong` of the pairs one picture shows another prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, others = draw_prompts(generator, n), draw_prompts(generator, n)
    lot = torch.rand(n, generator=generator).tolist()  # the lowest make the first picture stray, the next the second
    shown = [other if u < wrong / 2 else prompt for prompt, other, u in zip(prompts, others, lot, strict=False)]
    shown += [other if wrong / 2 <= u < wrong else prompt for prompt, other, u in zip(prompts, others, lot, strict=False)]
    images = worn(render(sample_scenes(generator, 2 * n, shown)), generator)
    if zoo is not None:
        sampled = (torch.rand(2 * n, generator=generator) < 0.5).nonzero().squeeze(1)
        images[sampled] = sample(load_pipeline(zoo), [shown[i] for i in sampled.tolist()], seed)
    return label_pairs(prompts, images[:n], images[n:], agreement, generator)


def sampled_pairs(zoo: Path, seed: int, n: int, agreement: float, apart: float = 0.0) -> Pairs:
    """n pairs of the pipeline's own samples; in a share of `apart` each picture has a prompt of its own.

    Pairs of one prompt leave the level of each prompt open: a judge that sees no prompt then invents it.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = draw_prompts(generator, n)
    second_prompts = draw_prompts(generator, round(n * apart)) + prompts[round(n * apart) :]
    images = sample(load_pipeline(zoo), prompts + second_prompts, seed)
    return label_pairs(prompts, images[:n], images[n:], agreement, generator, second_prompts)


def draw_prompts(generator: torch.Generator, n: int) -> list[str]:
    everything = all_prompts()
    return [everything[i] for i in torch.randint(len(everything), (n,), generator=generator).tolist()]


def label_pairs(
    prompts: list[str],
    first: Tensor,
    second: Tensor,
    agreement: float,
    generator: torch.Generator,
    second_prompts: list[str] | None = None,
) -> Pairs:
    """The annotator judges each picture by its own prompt."""
    gold_first, gold_second = gold(first, prompts), gold(second, second_prompts or prompts)
    agrees = torch.rand(len(prompts), generator=generator) < agreement
    label = ((gold_first > gold_second) == agrees).float()
    return Pairs(prompts, first, second, gold_first, gold_second, label)


def preference_loss(score_first: Tensor, score_second: Tensor, label: Tensor) -> Tensor:
    """Bradley and Terry: the chance that the first is preferred is sigmoid(difference). All [b]."""
    return F.binary_cross_entropy_with_logits(score_first - score_second, label)


@torch.no_grad()
def judge(scorer: Scorer, pairs: Pairs) -> dict:
    """Agreement of a learned reward with gold on held-out pairs."""
    first, second = scorer(pairs.first, pairs.prompts), scorer(pairs.second, pairs.prompts)
    scores = torch.cat([first, second])
    truth = torch.cat([pairs.gold_first, pairs.gold_second])
    difference = torch.stack([first - second, pairs.gold_first - pairs.gold_second])
    return {
        "accuracy_against_gold": _round(((first > second) == (pairs.gold_first > pairs.gold_second)).float().mean()),
        "accuracy_against_annotators": _round(((first > second).float() == pairs.label).float().mean()),
        "correlation_with_gold": _round(torch.corrcoef(torch.stack([scores, truth]))[0, 1]),
        "correlation_within_pairs": _round(torch.corrcoef(difference)[0, 1]),
        "score_mean": _round(scores.mean()),
        "score_std": _round(scores.std()),
    }


def _round(value: Tensor) -> float:
    return round(float(value), 4)
