"""The micro-batch that a measurement chooses: the need per sample, the room that is left, and nothing else of the run touched."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import LinearPolicy, make_preset

from tdpo_cli.machine import memory
from tdpo_cli.machine.measure import Need, measure
from tdpo_cli.machine.world import World
from tdpo_cli.train import fitting
from tdpo_cli.types import Conditioning

MB = 10**6


class Policy(LinearPolicy):
    """With what a measurement asks for beside transitions."""

    stochastic = torch.tensor([False, True, True])

    def encode(self, prompts):
        return Conditioning({"embeds": torch.ones(len(prompts) + 1, 2, 3)})


class FakeCounter:
    """A device on which weights take 100 MB, and each sample of a pass 7 MB; the first pass of all leaves 50 MB of workspace behind."""

    def __init__(self, policy):
        self.policy, self.seen = policy, []

    def held(self):
        return 100 * MB

    def peak_of(self, work):
        before = len(self.policy.calls)
        work()
        rows = self.policy.calls[before:]
        self.seen.append(rows)
        return (100 + 50 + 7 * max(rows)) * MB


def job(**settings):
    preset = make_preset(model__base="sandbox", rollout__samples_per_epoch=64, update__batch_size=64, **settings)
    plan = replace(memory.USUAL, offload=True)
    return SimpleNamespace(preset=preset, policy=Policy(), world=World(), plan=plan, prompts=["a cat"])


@pytest.mark.parametrize(("megabytes", "micro"), [(400, 32), (263, 16), (215, 8), (180, 4), (172, 2), (157.5, 1), (10, 1)])
def test_micro_batch_is_the_largest_that_fits(megabytes, micro):
    this = job()
    need = fitting.fit(this, int(megabytes * MB), FakeCounter(this.policy))
    assert need == Need(150 * MB, 7 * MB)
    assert this.plan == replace(memory.USUAL, offload=True, micro_batch=micro)


def test_passes_of_one_and_two_samples_are_measured_after_one_that_is_not():
    this, counter = job(), None
    counter = FakeCounter(this.policy)
    fitting.fit(this, 400 * MB, counter)
    assert this.policy.calls == [1, 1, 2] and counter.seen == [[1], [2]]


def test_measuring_leaves_weights_gradients_and_random_numbers_alone():
    this = job()
    weights, state = [p.detach().clone() for p in this.policy.trainable.values()], torch.get_rng_state()
    fitting.fit(this, 400 * MB, FakeCounter(this.policy))
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(this.policy.trainable.values(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_computes_too_where_the_loss_has_a_kl_term():
    this = job(update__kl_coef=0.1)
    fitting.fit(this, 400 * MB, FakeCounter(this.policy))
    assert this.policy.calls == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("settings", "limit"), [({"run__micro_batch": 3}, 400 * MB), ({"run__compile": True}, 400 * MB), ({}, None)])
def test_nothing_is_measured_where_nothing_is_chosen(settings, limit):
    this = job(**settings)
    before = this.plan
    assert fitting.fit(this, limit, FakeCounter(this.policy)) is None
    assert this.plan == before and this.policy.calls == []


def test_what_is_asked_for_at_most_need_not_be_a_power_of_two():
    assert Need(0, 10).largest(1000, 6) == 6
    assert Need(0, 10).largest(55, 6) == 4


def test_memory_that_runs_out_while_measuring_is_not_swallowed():
    def work(rows):
        if rows == 2:
            raise MemoryError("two samples")

    counter = SimpleNamespace(peak_of=lambda call: call() or 5)
    with pytest.raises(MemoryError):
        measure(work, counter)
