"""Facts about chance: every draw depends on (seed, purpose, epoch, sample id) and on nothing else."""

import pytest
import torch

from tdpo_cli.randomness import Randomness, shuffle_plan, unshuffled

SHAPE = (2, 3, 3)


@pytest.mark.parametrize(
    "draw",
    [
        lambda ids: Randomness(1).initial_latents(4, ids, SHAPE),
        lambda ids: Randomness(1).step_noise(4, 2, ids, SHAPE),
        lambda ids: torch.tensor(Randomness(1).prompts(4, ids, range(1000))),
    ],
    ids=["initial latents", "step noise", "prompts"],
)
def test_a_sample_gets_the_same_draw_in_any_batch_and_any_order(draw):
    everyone = draw(range(8))
    assert torch.cat([draw(range(3)), draw(range(3, 8))]).equal(everyone)
    assert draw([5, 0, 7]).equal(everyone[[5, 0, 7]])
    assert len({tuple(row.flatten().tolist()) for row in everyone}) == 8


def test_ids_may_be_python_or_tensor_numbers():
    assert Randomness(1).initial_latents(0, torch.tensor([3]), SHAPE).equal(Randomness(1).initial_latents(0, [3], SHAPE))


def test_every_part_of_the_key_matters():
    draws = [
        Randomness(1).initial_latents(0, [0], SHAPE),
        Randomness(2).initial_latents(0, [0], SHAPE),
        Randomness(1, "preview").initial_latents(0, [0], SHAPE),
        Randomness(1, "sample").initial_latents(0, [0], SHAPE),
        Randomness(1).initial_latents(1, [0], SHAPE),
        Randomness(1).initial_latents(0, [1], SHAPE),
        Randomness(1).step_noise(0, 0, [0], SHAPE),
        Randomness(1).step_noise(0, 1, [0], SHAPE),
        Randomness(1).step_noise(1, 0, [0], SHAPE),
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_generators_of_different_purposes_differ():
    one = Randomness(1)
    generators = [
        one.reset(0, 0), one.reset(0, 1), one.reset(1, 0), one.initial_weights("critic"), one.initial_weights("lora"),
        one.generator("samples", 0, 0), one.generator("steps", 0, 0), one.generator("dropout", 0, 0, 0),
    ]  # fmt: skip
    assert len({generator.initial_seed() for generator in generators}) == len(generators)


def test_keys_do_not_run_together():
    assert Randomness(1).generator(1, 11).initial_seed() != Randomness(1).generator(11, 1).initial_seed()


def test_a_draw_is_the_same_on_every_machine_and_in_every_version():
    # changing this number changes every run ever made
    assert Randomness(42).generator("latents", 0, 0).initial_seed() == 2260111012753044091


def test_nothing_is_drawn_from_or_given_to_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = Randomness(1)
    first = one.initial_latents(0, [0], SHAPE)
    one.permutation(0, 0, 5), one.keep_masks(0, 0, 0, 3, [4], [0.5]), one.prompts(0, [0], "ab")
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(9)
    assert one.initial_latents(0, [0], SHAPE).equal(first)


def test_latents_are_standard_normal():
    draws = Randomness(1).initial_latents(0, range(400), (4, 4, 4))
    assert draws.mean().abs() < 0.02 and (draws.std() - 1).abs() < 0.02


def test_prompts_are_uniform_with_replacement():
    drawn = Randomness(1).prompts(0, range(3000), "abc")
    assert all(abs(drawn.count(letter) - 1000) < 100 for letter in "abc")


# --- shuffling --------------------------------------------------------------------------------------------------------
def pairs(plan):
    return list(zip(plan.sample_index.flatten().tolist(), plan.step_index.flatten().tolist(), strict=True))


EVERY_PAIR = [(i, k) for i in range(6) for k in range(4)]


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("timesteps", [False, True])
def test_a_plan_visits_every_pair_exactly_once(samples, timesteps):
    plan = shuffle_plan(Randomness(1), 0, 0, unshuffled(6, 4), samples, timesteps)
    assert sorted(pairs(plan)) == EVERY_PAIR
    assert (pairs(plan) == EVERY_PAIR) is not (samples or timesteps)


def test_a_row_holds_one_sample_with_its_own_order_of_steps():
    plan = shuffle_plan(Randomness(1), 0, 0, unshuffled(6, 4), True, True)
    assert (plan.sample_index == plan.sample_index[:, :1]).all()
    assert len({tuple(row) for row in plan.step_index.tolist()}) > 1


def test_shuffling_samples_alone_leaves_the_steps_in_order():
    plan = shuffle_plan(Randomness(1), 0, 0, unshuffled(6, 4), True, False)
    assert plan.step_index.equal(unshuffled(6, 4).step_index)


def test_an_inner_epoch_shuffles_the_already_shuffled_order():
    one = Randomness(1)
    first = shuffle_plan(one, 0, 0, unshuffled(6, 4), True, True)
    second = shuffle_plan(one, 0, 1, first, True, True)
    assert sorted(pairs(second)) == EVERY_PAIR
    order, steps = one.permutation(0, 1, 6), one.step_permutations(0, 1, 6, 4)
    assert second.sample_index.equal(first.sample_index[order])
    assert second.step_index.equal(first.step_index[order].gather(1, steps))
    assert pairs(second) != pairs(shuffle_plan(one, 0, 1, unshuffled(6, 4), True, True))


def test_shuffling_leaves_the_plan_before_alone():
    before = unshuffled(6, 4)
    shuffle_plan(Randomness(1), 0, 0, before, True, True)
    assert pairs(before) == EVERY_PAIR


def test_first_columns_are_the_first_slots_of_every_row():
    plan = shuffle_plan(Randomness(1), 0, 0, unshuffled(6, 4), True, True)
    assert plan.first_columns(2).step_index.equal(plan.step_index[:, :2])
    assert plan.first_columns(2).sample_index.shape == (6, 2)


# --- dropout ----------------------------------------------------------------------------------------------------------
def test_keep_masks_keep_the_wanted_share():
    masks = Randomness(1).keep_masks(0, 0, 0, 200, (1024, 128), (0.2, 0.1))
    assert [mask.shape for mask in masks] == [(200, 1024), (200, 128)]
    assert masks[0].float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert masks[1].float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_every_optimizer_step_drops_others():
    draw = lambda *key: Randomness(1).keep_masks(*key, 8, (64,), (0.5,))[0]
    assert draw(0, 0, 0).equal(draw(0, 0, 0))
    assert not any(draw(0, 0, 0).equal(draw(*key)) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
