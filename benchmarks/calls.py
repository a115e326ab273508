"""Record the network calls of a piece of work by phase, and make the same calls again without the work around these."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import Phases
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from tdpo_cli.algorithms.critic import Critic


class Meter:
    """`with meter("rollout"): ...` adds up wall and CPU seconds by phase. A phase inside another one stops that one's clock."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize = synchronize
        self.phases: Phases = {}
        self.stack: list[str] = []
        self.since = (0.0, 0.0)

    def _book(self) -> None:
        self.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.stack:
            spent = self.phases.get(self.stack[-1], (0.0, 0.0))
            self.phases[self.stack[-1]] = spent[0] + now[0] - self.since[0], spent[1] + now[1] - self.since[1]
        self.since = now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._book()
        self.stack.append(phase)
        try:
            yield
        finally:
            self._book()
            self.stack.pop()


@dataclass
class Call:
    """One kind of call: the first of its arguments, which stand for all calls of the same network and shapes."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    inference: bool
    gradients: bool

    def __call__(self) -> None:
        """With gradients also the backward pass, from ones."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.gradients):
            out = self.module(*self.args, **self.kwargs)
            ends = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if ends:
                torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])


class Calls:
    """The calls of every phase, in their order."""

    def __init__(self) -> None:
        self.kinds: dict[tuple, Call] = {}
        self.phases: dict[str, list[tuple]] = {}

    @contextlib.contextmanager
    def recording(self, meter: Meter) -> Iterator[None]:
        """Within: the outermost call of each network goes to the meter's phase. The product's own modules around networks are looked through."""
        real, depth = nn.Module.__call__, 0

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth or not meter.stack or not _is_network(module):
                return real(module, *args, **kwargs)
            self.phases.setdefault(meter.stack[-1], []).append(self._kind(module, args, kwargs))
            depth += 1
            try:
                return real(module, *args, **kwargs)
            finally:
                depth -= 1

        nn.Module.__call__ = call
        try:
            yield
        finally:
            nn.Module.__call__ = real

    def _kind(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        leaves, structure = tree_flatten((args, kwargs))
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        key = (id(module), *modes, str(structure), *(_signature(leaf) for leaf in leaves))
        if key not in self.kinds:
            copied = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            self.kinds[key] = Call(module, *copied, *modes)
        return key

    def replay(self, phase: str) -> None:
        """The phase's calls once more; gradients that arise are dropped at its end."""
        for key in self.phases[phase]:
            self.kinds[key]()
        for call in self.kinds.values():
            if call.gradients:
                for parameter in call.module.parameters():
                    parameter.grad = None

    def timed(self, synchronize: Callable[[], None] = lambda: None) -> Phases:
        """Seconds of every phase's calls alone."""
        meter = Meter(synchronize)
        for phase in self.phases:
            with meter(phase):
                self.replay(phase)
        return meter.phases

    def main_call(self, phase: str) -> Call:
        """The call that the phase makes most often, of those with the most weights."""
        counts = Counter(self.phases[phase])
        weights = lambda key: sum(parameter.numel() for parameter in self.kinds[key].module.parameters())
        return self.kinds[max(counts, key=lambda key: (weights(key), counts[key]))]


def _is_network(module: nn.Module) -> bool:
    """Not the product's wrappers, whose preprocessing is not a network call; its critic is a network."""
    return isinstance(module, Critic) or type(module).__module__.partition(".")[0] not in ("tdpo_cli", "setup", "__main__")


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, str | int | float | None) else type(leaf)
