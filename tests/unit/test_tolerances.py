"""Facts about the bounds of tests/tolerances.py: rounding of the assumed size is within, real mistakes are not."""

import dataclasses

import pytest
import torch
from helpers import make_preset
from tolerances import PREDICTION, errors

from tdpo_cli.config.preset import override
from tdpo_cli.console import Console
from tdpo_cli.machine import memory
from tdpo_cli.machine.world import World
from tdpo_cli.randomness import Randomness
from tdpo_cli.train import update as updates
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.state import build
from tdpo_cli.train.update import Learner

PRESET = make_preset(
    model__base="sandbox", model__lora_rank=4, model__dtype="fp32", rollout__prompts="sandbox", rollout__samples_per_epoch=16, rollout__steps=10,
    rollout__guidance_scale=3.0, reward__train="aesthetic", reward__watch=["gold"], reward__zoo="sandbox", algorithm__critic_init_std=0.11,
    algorithm__reset_every=2, algorithm__reset_target="all", update__batch_size=8, update__learning_rate=1.5e-3, update__critic_learning_rate=1e-3,
    update__max_grad_norm=3e-3, update__clip_range=0.5, update__clip_range_critic=0.0, run__preview_images=0,
)  # fmt: skip


# the same, smaller: for the tests that are not slow
SMALL = override(PRESET, [("rollout.samples_per_epoch", 8), ("rollout.steps", 5), ("update.batch_size", 4)])


def rows(epochs, change=lambda job: None, preset=PRESET):
    torch.manual_seed(0)
    job = build(preset, World(), memory.Plan.of(8))
    change(job)
    return [run_epoch(job, epoch, Console(quiet=True)) for epoch in range(epochs)]


@pytest.fixture(scope="module")
def first():
    return rows(1, preset=SMALL)


@pytest.fixture(scope="module")
def reference():
    return rows(3)


def noise(seed):
    """Relative noise of the assumed size in everything the network predicts."""
    draw = torch.Generator().manual_seed(seed)

    def change(job):
        predict = job.policy.predict

        def noisy(*arguments, **more):
            prediction = predict(*arguments, **more)
            return prediction * (1 + PREDICTION * torch.randn(prediction.shape, generator=draw))

        job.policy.predict = noisy

    return change


def assert_within(reference, epochs, seed, preset):
    for one, other in zip(reference, rows(epochs, noise(seed), preset), strict=True):
        found = errors(one, other, preset)
        print({name: round(error, 3) for name, error in found.items() if error})
        assert max(found.values()) <= 1, f"epoch {one['epoch']}: {found}"


@pytest.mark.slow
def test_rounding_of_the_assumed_size_is_within_the_first_epochs_bounds(first):
    assert_within(first, 1, 1, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_rounding_of_the_assumed_size_is_within_the_bounds(reference, seed):
    assert_within(reference, 3, seed, PRESET)


def shuffled(patch):
    order = Randomness.permutation
    patch.setattr(Randomness, "permutation", lambda self, epoch, inner, n: order(self, epoch, inner, n).flip(0))


def left_out(patch):
    step = Learner._step

    def without_the_last_two(learner, material, batch, observer):
        return step(learner, material, dataclasses.replace(batch, own=batch.own[:-2]), observer)

    patch.setattr(Learner, "_step", without_the_last_two)


def scaled(name):
    def mutate(patch):
        loss = getattr(updates, name)

        def one_percent_more(*arguments):
            losses, clipped = loss(*arguments)
            return losses * 1.01, clipped

        patch.setattr(updates, name, one_percent_more)

    return mutate


def advantages(patch):
    from tdpo_cli.algorithms.tdpo import TDPO

    share_out = TDPO.share_out

    def shifted(self, everyone, normed):
        found = share_out(self, everyone, normed)
        return dataclasses.replace(found, advantages=found.advantages.roll(1, 0))

    patch.setattr(TDPO, "share_out", shifted)


MISTAKES = {
    "another order": shuffled, "a micro-batch left out": left_out, "1 % in the policy's loss": scaled("policy_loss"),
    "1 % in the critic's loss": scaled("critic_loss"), "another sample's advantages": advantages,
}  # fmt: skip


def assert_beyond(reference, preset):
    found = errors(reference[0], rows(1, preset=preset)[0], preset)
    print({column: round(error, 2) for column, error in found.items() if error > 1})
    assert max(found.values()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another order", "1 % in the policy's loss"])
def test_a_mistake_is_beyond_the_bounds_of_a_small_epoch(first, monkeypatch, name):
    MISTAKES[name](monkeypatch)
    assert_beyond(first, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_beyond_the_bounds(reference, monkeypatch, name):
    MISTAKES[name](monkeypatch)
    assert_beyond(reference, PRESET)


@pytest.mark.slow
def test_a_state_lost_between_epochs_is_beyond_the_bounds(reference):
    """What a resume may get wrong: the optimizers' moments."""
    torch.manual_seed(0)
    job = build(PRESET, World(), memory.Plan.of(8))
    run_epoch(job, 0, Console(quiet=True))
    job.optimizers.policy.state.clear()
    found = errors(reference[1], run_epoch(job, 1, Console(quiet=True)), PRESET)
    print({column: round(error, 2) for column, error in found.items() if error > 1})
    assert max(found.values()) > 2
