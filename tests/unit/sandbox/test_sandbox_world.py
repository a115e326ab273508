"""Facts about the sandbox's pictures, prompts and gold reward."""

import dataclasses

import pytest
import torch

from tdpo_cli.sandbox import world
from tdpo_cli.sandbox.world import gold, gold_terms, render, sample_scenes, short_captions


def scenes_like(n=12, **changes):
    """One shape of each kind, large and in the middle, with the given fields replaced."""
    scenes = sample_scenes(3, n)
    middle = {
        "shape": torch.arange(n) % len(world.SHAPES),
        "size": torch.full((n,), 8.5),
        "x": torch.zeros(n),
        "y": torch.zeros(n),
    }
    return dataclasses.replace(scenes, **(middle | changes))


def test_prompts_are_all_combinations():
    prompts = world.all_prompts()
    assert len(prompts) == len(set(prompts)) == 6 * 8 * 7
    assert "a red circle on a blue background" in prompts


def test_held_out_prompts_are_disjoint_and_cover_every_word():
    train, held_out = world.train_prompts(), world.held_out_prompts()
    assert len(held_out) == world.HELD_OUT == 48
    assert set(train) | set(held_out) == set(world.all_prompts()) and not set(train) & set(held_out)
    for prompts in (train, held_out):
        for words in (world.SHAPES, world.COLOURS, world.BACKGROUNDS):
            assert all(any(f" {word} " in f" {prompt} " for prompt in prompts) for word in words)


def test_quickstart_prompts_are_varied_training_prompts():
    prompts = world.quickstart_prompts()
    assert len(set(prompts)) == 8 and set(prompts) <= set(world.train_prompts())
    shapes, colours, backgrounds = (set(column.tolist()) for column in world.parse(prompts).T)
    assert (len(shapes), len(colours), len(backgrounds)) == (6, 8, 7)


def test_same_seed_same_pictures_in_range():
    first, second = render(sample_scenes(7, 16)), render(sample_scenes(7, 16))
    assert torch.equal(first, second)
    assert not torch.equal(first, render(sample_scenes(8, 16)))
    assert first.shape == (16, 3, 32, 32) and first.min() >= 0 and first.max() <= 1


def test_scenes_follow_given_prompts():
    prompts = world.held_out_prompts()
    assert short_captions(sample_scenes(0, len(prompts), prompts)) == prompts


def test_every_outline_has_the_area_its_size_says():
    area = world.outlines(torch.tensor([7.0]), torch.zeros(1), torch.zeros(1)).sum((2, 3))
    assert torch.allclose(area, torch.full((1, 6), torch.pi * 49), rtol=0.03)


def test_captions_name_size_and_place():
    scenes = scenes_like(2, size=torch.tensor([4.2, 8.8]), x=torch.tensor([-6.0, 5.0]), y=torch.tensor([-5.0, 0.0]))
    small, large = world.caption(scenes)
    assert " tiny " in small and "upper left" in small
    assert " huge " in large and "middle right" in large
    assert {word for text in world.caption(sample_scenes(0, 500)) for word in text.split()} <= set(world.vocabulary())


def test_gold_fidelity_of_clean_renders_is_high():
    scenes = sample_scenes(1, 300)
    assert gold_terms(render(scenes), short_captions(scenes))["fidelity"].mean() > 0.85


def test_gold_reads_size_and_place_from_the_picture():
    scenes = sample_scenes(2, 100)
    assert (gold_terms(render(scenes), short_captions(scenes))["radius"] - scenes.size).abs().median() < 0.5


@pytest.mark.parametrize("field, other", [("colour", 8), ("shape", 6), ("background", 7)])
def test_a_wrong_word_scores_lower(field, other):
    scenes = scenes_like()
    wrong = dataclasses.replace(scenes, **{field: (getattr(scenes, field) + 1) % other})
    prompts = short_captions(scenes)
    assert (gold(render(wrong), prompts) < 0.7 * gold(render(scenes), prompts)).all()


@pytest.mark.parametrize("change", [{"x": torch.full((12,), 5.0)}, {"size": torch.full((12,), 5.0)}])
def test_off_centre_or_small_scores_lower(change):
    scenes, worse = scenes_like(size=torch.full((12,), 7.0)), scenes_like(**({"size": torch.full((12,), 7.0)} | change))
    assert (gold(render(worse), short_captions(worse)) < gold(render(scenes), short_captions(scenes))).all()


def test_bigger_is_better_only_up_to_the_largest_of_the_world():
    by_size = [scenes_like(6, size=torch.full((6,), size)) for size in (5.0, 7.0, 9.0, 11.5)]
    small, medium, largest, huge = (gold(render(s), short_captions(s)).mean() for s in by_size)
    assert small < medium < largest and huge < 0.85 * largest


def test_gold_is_bounded_finite_and_deterministic_on_anything():
    prompts = world.all_prompts()[:8]
    flat = torch.zeros(8, 3, 32, 32)
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for images in (flat, flat + 1, noise, render(sample_scenes(0, 8)), torch.full_like(flat, float("nan"))):
        score = gold(images, prompts)
        assert score.shape == (8,) and score.isfinite().all() and (score >= 0).all() and (score <= 1).all()
        assert torch.equal(score, gold(images, prompts))
    assert gold(flat, prompts).max() < 0.05


def test_gold_hardly_depends_on_resolution():
    scenes = sample_scenes(4, 32)
    images, prompts = render(scenes), short_captions(scenes)
    large = torch.nn.functional.interpolate(images, size=(64, 96), mode="bilinear").clamp(0, 1)
    assert (gold(large, prompts) - gold(images, prompts)).abs().mean() < 0.06


def test_gold_of_one_picture_does_not_depend_on_its_neighbours():
    scenes = sample_scenes(5, 8)
    images, prompts = render(scenes), short_captions(scenes)
    alone = torch.cat([gold(images[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    assert torch.allclose(alone, gold(images, prompts), atol=1e-6)


def test_unreadable_prompt_says_what_was_expected():
    with pytest.raises(ValueError, match="'a dog'.*expected.*circle"):
        gold(torch.zeros(1, 3, 32, 32), ["a dog"])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        gold(torch.zeros(2, 3, 32, 32), world.all_prompts()[:1])
