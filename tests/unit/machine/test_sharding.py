"""When a network is sharded, and what is refused; that a sharded run is the same run is in tests/distributed."""

import pytest
import torch
from helpers import make_preset
from torch import nn

from tdpo_cli.errors import RequestError
from tdpo_cli.machine import sharding
from tdpo_cli.machine.world import World


def test_a_cpu_and_a_single_process_stay_whole():
    assert sharding.of(make_preset(), World(0, 2)) is None
    assert sharding.of(make_preset(run__shard="off"), World(0, 2, "cuda")) is None
    assert sharding.of(make_preset(), World()) is None


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [
        ({}, 1, "several processes"),
        ({"model__lora_rank": 0}, 2, "only a frozen network"),
        ({"rollout__samples_per_epoch": 9, "update__batch_size": 3}, 2, "multiples of the 2 processes"),
        ({"run__compile": True}, 2, "not tested"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, size, reason):
    with pytest.raises(RequestError, match=reason):
        sharding.of(make_preset(run__shard="on", **changes), World(0, size))


def test_blocks_are_the_entries_of_the_networks_lists():
    network = nn.Module()
    network.blocks, network.out = nn.ModuleList([nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)]), nn.Linear(2, 2)
    assert list(sharding.blocks(network)) == [network.blocks[0], network.blocks[2]]
    assert sharding.weight_bytes(network) == 3 * 6 * 4
    assert sharding.weight_bytes(nn.Linear(2, 2, dtype=torch.bfloat16)) == 12
