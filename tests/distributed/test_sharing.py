"""Facts about samples of several processes: small columns are everyone's, latents stay where they are trained on."""

import json

import inner_epochs
import pytest
import torch

from tdpo_cli.machine.world import World
from tdpo_cli.randomness import Randomness, shuffle_plan, unshuffled
from tdpo_cli.train import sharing
from tdpo_cli.train.update import own_pairs

ALL_TIMESTEPS = {"algorithm__name": "ddpo", "algorithm__update_mode": "all-timesteps"}


def workers(nursery, folder, size, settings):
    """Train in several processes. -> what each noted"""
    programs = [[inner_epochs.__file__, folder, rank, size, json.dumps(settings)] for rank in range(size)]
    for done in nursery.run(*programs):
        assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


# batches of 4 of 12 samples, 2 inner epochs
@pytest.mark.parametrize(
    "size, settings", [(2, {}), (3, {}), (2, ALL_TIMESTEPS), (4, ALL_TIMESTEPS)], ids=["two", "three, uneven", "all timesteps", "four"]
)
def test_several_processes_train_as_one(nursery, tmp_path, size, settings):
    alone, several = inner_epochs.train(World(), settings), workers(nursery, tmp_path, size, settings)
    expected = torch.tensor(alone["weights"])
    untrained = torch.tensor(
        inner_epochs.train(World(), settings | {"update__learning_rate": 1e-12, "update__critic_learning_rate": 1e-12})["weights"]
    )
    assert (expected - untrained).abs().max() > 1e-3
    for noted in several:
        assert torch.allclose(torch.tensor(noted["weights"]), expected, rtol=0, atol=2e-6)
        assert noted["small columns are everyone's"] and noted["scores are everyone's"]
    assert sum(noted["held"] for noted in several) == 12 and max(noted["held"] for noted in several) == 12 // size
    sent = [sum(inner) for inner in zip(*(noted["sent"] for noted in several), strict=True)]
    even = 4 % size == 0
    assert (sent[0] == 0) is even  # who samples also trains, where batches can be cut evenly
    assert 0 < sent[1] <= 12


# --- who trains on what ---------------------------------------------------------------------------------------------------
def an_order(samples=12, steps=3, inner=0):
    return shuffle_plan(Randomness(1), 0, inner, unshuffled(samples, steps), True, True)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("all_timesteps", [False, True])
def test_a_process_trains_on_the_samples_that_it_was_given_and_no_other(size, all_timesteps):
    """`trainers` against the pairs that the learner computes; every pair is somebody's, once."""
    order, batch_size = an_order(), 4
    trainer = sharing.trainers(order, batch_size, World(0, size))
    visited = []
    for rank in range(size):
        share = World(rank, size).share(batch_size)
        for sample_index, step_index in order.optimizer_steps(batch_size, all_timesteps):
            own = own_pairs(len(sample_index), batch_size, share)
            assert (trainer[sample_index[own]] == rank).all()
            visited += zip(sample_index[own].tolist(), step_index[own].tolist(), strict=True)
    assert sorted(visited) == [(i, k) for i in range(12) for k in range(3)]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_are_the_shares(count, size):
    ranks = World(0, size).ranks(count)
    for rank in range(size):
        share = World(rank, size).share(count)
        assert (ranks == rank).nonzero().flatten().tolist() == list(range(count))[share]


@pytest.mark.parametrize("size, batch_size", [(2, 4), (4, 4), (3, 4), (5, 4), (4, 2)])
def test_every_process_samples_as_many_as_the_others(size, batch_size):
    home = sharing.homes(an_order(), batch_size, World(0, size))
    counts = home.bincount(minlength=size)
    assert counts.sum() == 12 and counts.max() - counts.min() <= 1


def test_states_come_from_own_samples_and_visitors():
    own, visitors = torch.arange(8.0).view(2, 4, 1), 100 + torch.arange(4.0).view(1, 4, 1)
    latents = sharing.Latents(own, visitors, torch.tensor([1, -1, 2, 0]))
    states = latents.states(torch.tensor([2, 0, 3]), torch.tensor([1, 0, 3]), torch.device("cpu"))
    assert states.flatten().tolist() == [101, 4, 3]
