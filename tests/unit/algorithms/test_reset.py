"""Facts about dormant neurons and re-initialising a chosen set of them."""

import pytest
import torch
from helpers import LinearPolicy, make_preset, make_trajectory

from tdpo_cli import algorithms
from tdpo_cli.algorithms import reset
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.randomness import Randomness, unshuffled

HIDDEN = (4, 3, 2, 2)  # a critic small enough to count by hand


@pytest.fixture
def critic(monkeypatch):
    monkeypatch.setattr("tdpo_cli.algorithms.critic.WIDTHS", (*HIDDEN, 1))
    critic = Critic(2, init_std=0.5)
    with torch.no_grad():
        for layer in critic.layers:
            layer.weight.fill_(0.0)
            layer.bias.fill_(0.0)
        # embeddings are (1, 0) and (0, 1); outputs of the first layer: (2, 2), (-1, -3), (4, 0), (0, 0)
        critic.layers[0].weight.copy_(torch.tensor([[2.0, 2.0], [-1.0, -3.0], [4.0, 0.0], [0.0, 0.0]]))
        critic.layers[1].bias.copy_(torch.tensor([3.0, 1.0, -1.0]))
        critic.layers[2].bias.copy_(torch.tensor([-1.0, -2.0]))
        critic.layers[3].bias.copy_(torch.tensor([5.0, 1.0]))
    return critic


@pytest.fixture
def trained(critic):
    """The critic and its optimizer after a step, every weight and moment different from 0."""
    critic.initialise(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    critic(EMBEDS + 1).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter += 0.1
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment].fill_(0.7)
    return critic, optimizer


EMBEDS = torch.eye(2)
CHOSEN = [torch.tensor(mask) for mask in ([True, False, True, False], [False, True, False], [False, False], [True, True])]


# --- census -----------------------------------------------------------------------------------------------------------
def test_scores_by_hand(critic):
    census = reset.census(critic, EMBEDS, threshold=0.0)
    # mean of relu over rows: (2, 0, 2, 0), mean over the layer 1
    assert census.scores[0].tolist() == pytest.approx([2, 0, 2, 0])
    # (3, 1, 0), mean 4/3
    assert census.scores[1].tolist() == pytest.approx([2.25, 0.75, 0])
    assert census.scores[2].tolist() == [0, 0]  # 0 / 1e-9
    assert census.scores[3].tolist() == pytest.approx([5 / 3, 1 / 3])


def test_dormant_means_at_most_the_threshold(critic):
    census = reset.census(critic, EMBEDS, threshold=0.0)
    assert [mask.tolist() for mask in census.dormant] == [[False, True, False, True], [False, False, True], [True, True], [False, False]]
    assert (census.total, census.dormant_count) == (11, 5)
    assert census.dormant_at(0.75) == 7
    assert reset.census(critic, EMBEDS, threshold=0.75).dormant_count == 7


def test_the_output_neuron_is_not_counted(critic):
    assert len(reset.census(critic, EMBEDS, 0.0).dormant) == 4


def test_overlap_is_in_units_of_the_smaller_set(critic):
    now = reset.census(critic, EMBEDS, 0.0)
    assert now.overlap is None
    before = [torch.zeros_like(mask) for mask in now.dormant]
    before[0][[0, 1]] = True  # neuron 1 is dormant now too
    assert reset.census(critic, EMBEDS, 0.0, before).overlap == 1 / 2
    assert reset.census(critic, EMBEDS, 0.0, now.dormant).overlap == 1
    assert reset.census(critic, EMBEDS, 0.0, [torch.zeros_like(mask) for mask in before]).overlap is None


@pytest.mark.parametrize("target, chosen", [("active", [True, False]), ("dormant", [False, True]), ("all", [True, True]), ("none", [False, False])])
def test_targets(target, chosen):
    assert reset.TARGETS[target](torch.tensor([False, True])).tolist() == chosen


# --- re-initialising ----------------------------------------------------------------------------------------------------
def changed_where(critic):
    """Per layer, which entries of weight and bias the choice reaches: incoming rows, bias, outgoing columns."""
    weights = [torch.zeros(layer.weight.shape, dtype=torch.bool) for layer in critic.layers]
    biases = [torch.zeros(layer.bias.shape, dtype=torch.bool) for layer in critic.layers]
    for i, mask in enumerate(CHOSEN):
        weights[i][mask] = True
        biases[i][mask] = True
        weights[i + 1][:, mask] = True
    return weights, biases


def test_rows_bias_and_columns_change_exactly_where_chosen(trained):
    critic, optimizer = trained
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    count = reset.reinitialise(critic, optimizer, CHOSEN, torch.Generator().manual_seed(1))
    assert count == 5
    for i, (weight, bias) in enumerate(zip(*changed_where(critic), strict=True)):
        assert (critic.layers[i].weight != before[f"layers.{i}.weight"]).equal(weight), i
        assert (critic.layers[i].bias != before[f"layers.{i}.bias"]).equal(bias), i
        assert (critic.layers[i].bias[bias] == 0).all()


def test_the_last_bias_stays_even_if_all_are_chosen(trained):
    critic, optimizer = trained
    before = critic.layers[-1].bias.clone()
    reset.reinitialise(critic, optimizer, [torch.ones_like(mask) for mask in CHOSEN], torch.Generator())
    assert critic.layers[-1].bias.equal(before)


def test_adam_forgets_exactly_the_chosen_entries(trained):
    critic, optimizer = trained
    reset.reinitialise(critic, optimizer, CHOSEN, torch.Generator().manual_seed(1))
    for layer, weight, bias in zip(critic.layers, *changed_where(critic), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (optimizer.state[layer.weight][moment] == 0).equal(weight)
            assert (optimizer.state[layer.bias][moment] == 0).equal(bias)


def test_adam_keeps_its_step_counters(trained):
    critic, optimizer = trained
    reset.reinitialise(critic, optimizer, CHOSEN, torch.Generator().manual_seed(1))
    assert {state["step"].item() for state in optimizer.state.values()} == {1}


def test_draws_go_layer_by_layer_rows_then_the_next_layers_columns(trained):
    critic, optimizer = trained
    reset.reinitialise(critic, optimizer, CHOSEN, torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.empty(shape).normal_(0, 0.5, generator=draw)
    rows_0, columns_1, rows_1, columns_2 = normal(2, 2), normal(3, 2), normal(1, 4), normal(2, 1)
    rows_3, columns_4 = normal(2, 2), normal(1, 2)  # nobody of layer 2 is chosen: nothing is drawn
    assert critic.layers[0].weight[CHOSEN[0]].equal(rows_0)
    # where a chosen row crosses a chosen column, the later draw - the row - stays
    assert critic.layers[1].weight[[0, 2]][:, CHOSEN[0]].equal(columns_1[[0, 2]])
    assert critic.layers[1].weight[CHOSEN[1]].equal(rows_1)
    assert critic.layers[2].weight[:, CHOSEN[1]].equal(columns_2)
    assert critic.layers[3].weight.equal(rows_3)
    assert critic.layers[4].weight.equal(columns_4)


def test_choosing_nobody_changes_nothing(trained):
    critic, optimizer = trained
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    assert reset.reinitialise(critic, optimizer, [torch.zeros_like(mask) for mask in CHOSEN], torch.Generator()) == 0
    assert all(value.equal(before[name]) for name, value in critic.state_dict().items())


def test_a_fresh_optimizer_without_moments_is_no_obstacle(critic):
    optimizer = torch.optim.AdamW(critic.parameters())
    assert reset.reinitialise(critic, optimizer, CHOSEN, torch.Generator()) == 5


def test_new_weights_have_the_critics_initial_std():
    critic = Critic(64, init_std=0.3)
    critic.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        critic.layers[0].weight.zero_()
    everyone = [torch.ones(width, dtype=torch.bool) for width in (1024, 128, 64, 16)]
    reset.reinitialise(critic, torch.optim.AdamW(critic.parameters()), everyone, torch.Generator().manual_seed(1))
    assert critic.layers[0].weight.std().item() == pytest.approx(0.3, rel=0.02)


# --- when, and on what ------------------------------------------------------------------------------------------------
def test_tdpo_r_resets_in_every_epoch_that_completes_a_period():
    algorithm = algorithms.make(make_preset(algorithm__reset_every=3, algorithm__reset_target="dormant"))
    assert [algorithm.reset_target(epoch) for epoch in range(6)] == ["none", "none", "dormant", "none", "none", "dormant"]


def test_tdpo_counts_but_never_resets():
    algorithm = algorithms.make(make_preset(algorithm__name="tdpo", algorithm__reset_every=1))
    assert {algorithm.reset_target(epoch) for epoch in range(4)} == {"none"}


def test_the_census_looks_at_the_last_trained_slot_of_the_first_rows():
    everyone = make_trajectory(LinearPolicy(steps=4), samples=6)
    critic = Critic(5, 0.2)
    critic.initialise(torch.Generator().manual_seed(0))
    plan = unshuffled(6, 4)
    plan.sample_index[:] = plan.sample_index.flip(0)
    plan.step_index[:] = torch.tensor([3, 1, 2, 0])
    algorithm = algorithms.make(make_preset(algorithm__name="tdpo", algorithm__neuron_rows=2))
    optimizer = torch.optim.AdamW(critic.parameters())
    facts = algorithm.after_inner_epoch(critic, optimizer, everyone, plan.first_columns(3), 0, Randomness(0))
    expected = reset.census(critic, everyone.image_embeds[[5, 4], 2], 0.0)
    assert algorithm.last_census.activations[0].equal(expected.activations[0])
    assert facts == {
        "dormant_fraction": expected.dormant_count / 1232, "dormant_overlap": None, "dormant_fraction_extra": None, "reset": 0,
    }  # fmt: skip


def test_a_reset_renews_the_active_neurons_and_says_how_many():
    everyone = make_trajectory(LinearPolicy(steps=4), samples=6)
    critic = Critic(5, 0.2)
    critic.initialise(torch.Generator().manual_seed(0))
    before = critic.layers[0].weight.clone()
    algorithm = algorithms.make(make_preset(algorithm__reset_every=1, algorithm__extra_dormant_threshold=0.5))
    optimizer = torch.optim.AdamW(critic.parameters())
    facts = algorithm.after_inner_epoch(critic, optimizer, everyone, unshuffled(6, 4), 0, Randomness(0))
    active = ~algorithm.dormant[0]
    assert (critic.layers[0].weight != before).any(dim=1).equal(active)
    assert facts["reset"] == sum(int((~mask).sum()) for mask in algorithm.dormant)
    assert 1 > facts["dormant_fraction_extra"] > facts["dormant_fraction"] > 0
