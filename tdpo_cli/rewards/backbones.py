"""Hand out frozen networks, one instance per model and weights, so that rewards and the critic share what they can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tdpo_cli.errors import RewardError
from tdpo_cli.rewards.networks import CLIP_HUB, ClipBackbone, Frozen, OpenClipBackbone, ScoreHead, clip_files


class ImageEncoder(Protocol):
    """The critic's eye."""

    embed_dim: int
    image_size: int  # pixels, of the square the network sees

    def __call__(self, images: Tensor) -> Tensor:
        """images [b,3,H,W] float in [0,1] -> [b,embed_dim] float32, L2-normalised."""


Network = TypeVar("Network", bound=Frozen)


class Backbones:
    """All frozen networks of a process.

    `dtype` is the precision of the backbones (score heads stay float32). float32 is the official one, also where a
    checkpoint is stored in half precision.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.device = torch.device(device)
        self.dtype = dtype
        self._held: dict[Hashable, Frozen] = {}
        self._parked = False

    def hold(self, key: Hashable, build: Callable[[], Network]) -> Network:
        """The network known as `key`, built at the first request, frozen, on the device."""
        if key not in self._held:
            with torch.inference_mode(False):  # tensors made in inference mode could not be moved outside it
                network = build().eval().requires_grad_(False)
                network.to(torch.float32 if isinstance(network, ScoreHead) else self.dtype)
                network.move(torch.device("cpu") if self._parked else self.device)
            self._held[key] = network
        return self._held[key]  # type: ignore[return-value]

    def clip(
        self,
        source: str | Path = CLIP_HUB,
        *,
        needed_by: str = "CLIP",
        hub_id: str = CLIP_HUB,
        tokenizer_hub: str = CLIP_HUB,
    ) -> ClipBackbone:
        """A CLIPModel from a folder or hub id; the same files are the same instance, however they are named.

        The tokenizer is read when a text first comes, from `source`, else from `tokenizer_hub`. `needed_by` and
        `hub_id` (where the published files lie) are for messages.
        """
        key = ("clip", *(path.resolve() for path in clip_files(source, needed_by, hub_id)))
        return self.hold(key, lambda: ClipBackbone(source, needed_by, hub_id, tokenizer_hub))

    def open_clip(self, source: str | Path) -> OpenClipBackbone:
        """An open_clip CLIP from its weights file."""
        path = Path(source).expanduser()
        if not path.is_file():
            raise RewardError(f"there is no open_clip weights file {path}")
        return self.hold(("open_clip", path.resolve()), lambda: OpenClipBackbone(path))

    def park(self) -> None:
        """Move every network to the CPU, so that training has the device's memory. Scoring still works, slowly."""
        self._parked = True
        for network in self._held.values():
            network.move(torch.device("cpu"))

    @contextlib.contextmanager
    def awake(self, user: object) -> Iterator[None]:
        """While they are parked: the networks of one reward, or one encoder, are on the device for the time of the block."""
        used = [network for network in (user, *vars(user).values()) if isinstance(network, Frozen)] if self._parked and user is not None else []
        for network in used:
            network.move(self.device)
        try:
            yield
        finally:
            for network in used:
                network.move(torch.device("cpu"))
