"""Facts about how far learned rewards agree with each other on an epoch's samples."""

import pytest
import torch

from tdpo_cli.rewards.scoring import agreement

PROMPTS = list("aaaabbbb")


def test_the_same_ranking_within_every_prompt_is_full_agreement():
    trained = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])
    offset = torch.tensor([100.0] * 4 + [0.0] * 4)  # how good a prompt is does not matter
    assert agreement(trained, [trained * 3 + offset], PROMPTS) == pytest.approx(1)
    assert agreement(trained, [offset - trained], PROMPTS) == pytest.approx(-1)


def test_by_hand_with_one_prompt():
    trained, other = torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.0, 0, 3, 2])
    assert agreement(trained, [other], "aaaa") == pytest.approx(torch.corrcoef(torch.stack([trained, other]))[0, 1].item())


def test_others_count_the_same_whatever_their_scale():
    draw = torch.Generator().manual_seed(0)
    trained, one, two = torch.randn(3, 8, generator=draw)
    assert agreement(trained, [one, two], PROMPTS) == pytest.approx(agreement(trained, [one * 1000, two + 5], PROMPTS))


@pytest.mark.parametrize(
    "trained, others, prompts",
    [
        (torch.arange(4.0), [], "aaaa"),  # nothing watched
        (torch.arange(4.0), [torch.tensor([1.0, 2, float("nan"), 3])], "aaaa"),
        (torch.ones(4), [torch.arange(4.0)], "aaaa"),  # no spread
        (torch.arange(4.0), [torch.arange(4.0)], "abcd"),  # one sample of each prompt
    ],
)
def test_without_meaning_there_is_none(trained, others, prompts):
    assert agreement(trained, others, list(prompts)) is None
