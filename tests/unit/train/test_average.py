"""The moving average of the weights, by hand."""

import pytest
import torch

from tdpo_cli.train.average import Average


def test_the_average_warms_up_by_hand():
    weight = torch.tensor([0.0])
    average, seen = Average([weight], decay=0.15, every=1), []
    for value in (1.0, 2.0, 3.0):
        weight.fill_(value)
        average.update()
        seen.append(average.values[0].item())
    # d = 1/10, then min(2/11, 0.15), then min(3/12, 0.15)
    first = 0.1 * 0 + 0.9 * 1
    second = 0.15 * first + 0.85 * 2
    assert seen == pytest.approx([first, second, 0.15 * second + 0.85 * 3])


def test_the_average_moves_at_every_nth_step():
    weight = torch.tensor([0.0])
    average, seen = Average([weight], decay=0.9, every=3), []
    for _ in range(6):
        weight += 1
        average.update()
        seen.append(average.values[0].item())
    third = 0.75 * 3  # s = 2: d = 3/12
    assert seen == pytest.approx([0, 0, third, third, third, 0.4 * third + 0.6 * 6])  # s = 5: d = 6/15


def test_the_weights_are_back_afterwards_and_the_distance_is_relative():
    weight = torch.tensor([3.0, 4.0])
    average = Average([weight], decay=0.5, every=1)
    weight.copy_(torch.tensor([6.0, 8.0]))
    assert average.distance() == pytest.approx(0.5)
    with pytest.raises(KeyError), average.in_place():
        assert weight.tolist() == [3, 4]
        raise KeyError
    assert weight.tolist() == [6, 8] and average.values[0].tolist() == [3, 4]
