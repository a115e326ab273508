"""What rewards from optional packages share: a clear message where the package is missing, its version, pixels as it reads them."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

import numpy as np
from torch import Tensor

from tdpo_cli.errors import RewardError, first_line
from tdpo_cli.rewards.preprocess import quantise


def package(name: str, reward: str, needs: tuple[str, ...] = ()) -> ModuleType:
    """The package called `name`, and that those it `needs` can be imported. Raises RewardError with the command that installs them."""
    try:
        for other in needs:
            importlib.import_module(other)
        return importlib.import_module(name)
    except Exception as error:  # a package that is broken raises whatever it likes
        raise RewardError(
            f"the reward {reward} needs the package {name}, which cannot be imported ({first_line(error)}). "
            f"Install it with: pip install 'tdpo[{reward}]'"
        ) from error


def version(name: str) -> str:
    """The installed version of a package."""
    return f"{name} {importlib.metadata.version(name)}"


def blue_first(images: Tensor) -> np.ndarray:
    """images [b,3,H,W] in [0,1] -> [b,H,W,3] uint8, channels in the order blue, green, red: what OpenCV reads from a file."""
    return np.ascontiguousarray(quantise(images).byte().permute(0, 2, 3, 1).flip(-1).cpu().numpy())


def no_checkpoint(reward: str, checkpoint: str | None) -> None:
    """Refuse a checkpoint: the weights are those inside the package. Raises RewardError."""
    if checkpoint is not None:
        raise RewardError(f"{reward} brings its weights inside its package and takes no checkpoint (got {checkpoint})")
