"""Facts about how far learned rewards agree with each other: on an epoch's samples, on the images of a model and its base."""

import numpy as np
import pytest
import torch

from tdpo_cli.overoptimisation import agreement
from tdpo_cli.overoptimisation.agreement import of_samples
from tdpo_cli.overoptimisation.statistics import resample

PROMPTS = list("aaaabbbb")
ALL_OF_TWO = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])  # every way to draw two prompts twice


def test_the_same_ranking_within_every_prompt_is_full_agreement():
    trained = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])
    offset = torch.tensor([100.0] * 4 + [0.0] * 4)  # how good a prompt is does not matter
    assert of_samples(trained, [trained * 3 + offset], PROMPTS) == pytest.approx(1)
    assert of_samples(trained, [offset - trained], PROMPTS) == pytest.approx(-1)


def test_by_hand_with_one_prompt():
    trained, other = torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.0, 0, 3, 2])
    assert of_samples(trained, [other], "aaaa") == pytest.approx(torch.corrcoef(torch.stack([trained, other]))[0, 1].item())


def test_others_count_the_same_whatever_their_scale():
    draw = torch.Generator().manual_seed(0)
    trained, one, two = torch.randn(3, 8, generator=draw)
    assert of_samples(trained, [one, two], PROMPTS) == pytest.approx(of_samples(trained, [one * 1000, two + 5], PROMPTS))


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
    assert of_samples(trained, others, list(prompts)) is None


# --- a model against its base ------------------------------------------------------------------------------------------
def scored(prompts=24, images=4, alike=1.0, seed=0):
    """Scores of three rewards that share a part of what they see of an image; prompts differ much."""
    draw = np.random.default_rng(seed)
    shared, easy = draw.normal(size=(prompts, images)), 10 * draw.normal(size=(prompts, 1))
    own = {name: draw.normal(size=(prompts, images)) for name in ("aesthetic", "pickscore", "hpsv2")}
    scores = {name: easy + alike * shared + 0.5 * values for name, values in own.items()}
    return {**scores, "gold": draw.normal(size=(prompts, images))}


def plain(trained, others, prompts):
    """The same number, image by image."""
    mean = [sum(other[i] / np.std(other) for other in others) for i in range(len(prompts))]
    centred = lambda column: [x - np.mean([column[j] for j in range(len(prompts)) if prompts[j] == prompts[i]]) for i, x in enumerate(column)]
    return np.corrcoef(centred(trained), centred(mean))[0, 1]


def test_training_and_cross_evaluation_compute_the_same_number():
    scores = scored()
    trained, *others = (scores[name].flatten() for name in ("aesthetic", "pickscore", "hpsv2"))
    prompts = [str(p) for p in range(24) for _ in range(4)]
    in_training = agreement.of_samples(torch.tensor(trained), [torch.tensor(other) for other in others], prompts)
    assert agreement.correlation(agreement.of_model(scores, "aesthetic").sum(axis=0)) == pytest.approx(in_training, abs=1e-12)
    assert in_training == pytest.approx(plain(trained, others, prompts), abs=1e-12)
    assert 0.5 < in_training < 1


def test_prompts_may_have_any_number_of_samples_in_any_order():
    draw = np.random.default_rng(3)
    prompts = list("abacabdaab")
    trained, one, two = draw.normal(size=(3, 10))
    assert of_samples(trained, [one, two], prompts) == pytest.approx(plain(trained, [one, two], prompts), abs=1e-12)


def test_agreement_by_hand_over_the_resamples():
    sums = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])  # one prompt in full agreement, one in none
    found = agreement.change(sums, np.array([[-1.0, 1, 1], [0, 1, 1]]), ALL_OF_TWO)
    assert found["base"] == pytest.approx({"mean": 0.5, "low": 0.025, "high": 0.975})  # the resamples: 1, 1/2, 0
    assert found["change"] == pytest.approx({"mean": -1.0, "low": -1.95, "high": -0.05})


def test_an_image_with_a_missing_score_is_no_part_of_the_agreement():
    scores, shorter = scored(images=4), scored(images=4)
    for name, values in shorter.items():
        shorter[name] = values[:, :3]
    scores["pickscore"][:, 3] = np.nan
    assert agreement.of_model(scores, "aesthetic") == pytest.approx(agreement.of_model(shorter, "aesthetic"))


@pytest.mark.parametrize(
    "scores, trained",
    [
        (scored(images=1), "aesthetic"),
        (scored(), "gold"),
        (scored(), None),
        ({"aesthetic": np.ones((3, 2)), "gold": np.ones((3, 2))}, "aesthetic"),
        ({"aesthetic": np.full((3, 2), np.nan), "pickscore": np.ones((3, 2))}, "aesthetic"),
    ],
)
def test_without_two_images_or_another_learned_reward_there_is_no_agreement(scores, trained):
    assert agreement.of_model(scores, trained) is None


def test_one_prompt_that_is_known_gives_an_agreement_without_interval():
    base, model = scored(prompts=12), scored(prompts=12, alike=0.1)
    for scores in (base, model):
        scores["hpsv2"][1:] = np.nan
    sums = [agreement.of_model(scores, "aesthetic") for scores in (base, model)]
    found = agreement.change(*sums, resample(12, 0))
    assert found["change"]["mean"] is not None and found["change"]["low"] is None and not agreement.parted(found)


def test_rewards_without_spread_have_no_agreement_and_raise_no_doubt():
    flat = agreement.of_model({name: np.ones((12, 2)) for name in ("aesthetic", "pickscore")}, "aesthetic")
    found = agreement.change(flat, flat, resample(12, 0))
    assert found["change"] == {"mean": None, "low": None, "high": None} and not agreement.parted(found)


def test_rewards_part_where_they_agree_clearly_less_than_on_the_base():
    draws = resample(24, 0)
    sums = {alike: agreement.of_model(scored(alike=alike), "aesthetic") for alike in (2.0, 1.9, 0.2)}
    assert agreement.parted(agreement.change(sums[2.0], sums[0.2], draws))
    assert not agreement.parted(agreement.change(sums[2.0], sums[1.9], draws))
    assert not agreement.parted(agreement.change(sums[0.2], sums[2.0], draws))
    assert not agreement.parted(None)
