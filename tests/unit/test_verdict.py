"""Facts about how far a reward rose."""

import pytest

from tdpo_cli.verdict import rise


def curve(means, std=2.0):
    # only epoch 0's spread counts
    return [{"rewards/r/mean": mean, "rewards/r/std": std if epoch == 0 else 99.0} for epoch, mean in enumerate(means)]


@pytest.mark.parametrize(
    "means, expected",
    [
        ([1.0, 4.0], (4 - 1) / 2),
        ([1.0, 9.0, 9.0, 4.0], (4 - 1) / 2),  # fewer than five epochs: first and last
        (range(10), (8.5 - 0.5) / 2),  # two each
        (range(14), (12.5 - 0.5) / 2),  # a fifth of 14 is 2
        (range(25), (22 - 2) / 2),
        ([4.0, 1.0], -1.5),
    ],
)
def test_last_fifth_minus_first_fifth_in_units_of_epoch_0s_std(means, expected):
    assert rise(curve(list(means)), "r") == pytest.approx(expected)


@pytest.mark.parametrize("rows", [[], curve([1.0]), curve([1.0, 2.0], std=0.0), curve([1.0, 2.0], std=None), curve([1.0, None])])
def test_without_two_epochs_a_spread_and_all_means_there_is_no_rise(rows):
    assert rise(rows, "r") is None
