"""Facts about torch.compile: which blocks of a denoiser are compiled."""

from types import SimpleNamespace

import pytest
from torch import nn

from tdpo_cli.models.policy import Policy


class Denoiser(nn.Module):
    def __init__(self, named):
        super().__init__()
        self._repeated_blocks, self.asked = named, 0
        self.blocks, self.end = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2)

    def compile_repeated_blocks(self):
        self.asked += 1


@pytest.mark.parametrize(
    ("named", "asked", "compiled"), [(["Linear"], 1, False), *(pytest.param(named, 0, True, marks=pytest.mark.slow) for named in ([], None))]
)
def test_blocks_are_compiled_also_where_diffusers_does_not_name_them(named, asked, compiled):
    network = Denoiser(named)
    Policy.cut_up(SimpleNamespace(family=SimpleNamespace(network=network)), checkpointing=False, compile=True)
    assert network.asked == asked
    assert [block._compiled_call_impl is not None for block in network.blocks] == [compiled] * 2
    assert network.end._compiled_call_impl is None
