"""Facts about the critic."""

import pytest
import torch
from tolerances import same_output

from tdpo_cli.algorithms.critic import DROPOUT, WIDTHS, Critic


def made(embed_dim=6, init_std=0.2, seed=0):
    critic = Critic(embed_dim, init_std)
    critic.initialise(torch.Generator().manual_seed(seed))
    return critic


def embeds(rows=5, embed_dim=6):
    return torch.randn(rows, embed_dim, generator=torch.Generator().manual_seed(7))


def test_shapes():
    critic = made()
    assert critic(embeds()).shape == (5,)
    assert [tuple(output.shape) for output in critic.outputs(embeds())] == [(5, width) for width in WIDTHS]
    assert WIDTHS == (1024, 128, 64, 16, 1)


def test_it_is_linear_the_product_of_its_matrices():
    critic, product = made(), torch.eye(6)
    for layer in critic.layers:
        product = layer.weight @ product
    assert same_output(critic(embeds()), embeds() @ product[0])


def test_with_an_activation_it_is_that_of_every_layer_but_the_last():
    critic = Critic(6, 0.2, "relu")
    critic.initialise(torch.Generator().manual_seed(0))
    x = embeds()
    for i, layer in enumerate(critic.layers):
        x = x @ layer.weight.T + layer.bias
        x = x.clamp(min=0) if i < 4 else x
    assert same_output(critic(embeds()), x[:, 0])
    assert not critic(embeds()).allclose(made()(embeds()), atol=1e-3)
    assert critic.state_dict().keys() == made().state_dict().keys()


def test_biases_enter_every_layer():
    critic = made()
    with torch.no_grad():
        for layer in critic.layers:
            layer.bias.fill_(1.0)
    x = embeds()
    for layer in critic.layers:
        x = x @ layer.weight.T + 1
    assert same_output(critic(embeds()), x[:, 0])


def test_default_init_std_is_one_over_width_plus_one():
    critic = Critic(64)
    critic.initialise(torch.Generator().manual_seed(0))
    assert critic.init_std == 1 / 65
    assert critic.layers[0].weight.std().item() == pytest.approx(1 / 65, rel=0.02)  # 65,536 draws
    assert critic.layers[1].weight.std().item() == pytest.approx(1 / 65, rel=0.02)  # not by the layer's own width
    assert all((layer.bias == 0).all() for layer in critic.layers)


def test_init_std_can_be_given():
    assert made(init_std=0.11).layers[1].weight.std().item() == pytest.approx(0.11, rel=0.02)


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    one = made(seed=3)
    torch.manual_seed(2)
    two, three = made(seed=3), made(seed=4)
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not one.layers[0].weight.equal(three.layers[0].weight)


# --- dropout ----------------------------------------------------------------------------------------------------------
def masks(rows, keep=True):
    return [torch.full((rows, width), keep) for width in WIDTHS[: len(DROPOUT)]]


def test_keeping_everything_scales_by_the_inverse_keep_rates():
    critic = made()
    assert DROPOUT == (0.2, 0.2, 0.1)
    assert same_output(critic(embeds(), masks(5)), critic(embeds()) / (0.8 * 0.8 * 0.9))


def test_a_dropped_neuron_is_as_good_as_a_removed_one():
    critic, given = made(), masks(5)
    given[1][:, [3, 100]] = False
    with_mask = critic(embeds(), given)
    with torch.no_grad():
        critic.layers[2].weight[:, [3, 100]] = 0
    assert same_output(with_mask, critic(embeds(), masks(5)))


def test_masks_belong_to_rows():
    critic, given = made(), masks(5)
    given[0][2] = False
    values, kept = critic(embeds(), given), critic(embeds(), masks(5))
    assert values[2] == 0  # biases are 0, nothing is left
    assert values[[0, 1, 3, 4]].equal(kept[[0, 1, 3, 4]])


def test_without_masks_nothing_is_dropped_even_in_training():
    critic = made().train()
    assert critic(embeds()).equal(critic.eval()(embeds()))


def test_half_precision_embeddings_are_read_in_single():
    assert made()(embeds().half()).dtype == torch.float32
