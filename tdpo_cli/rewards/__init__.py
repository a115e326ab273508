"""What scores an image: the published reward models, simple rewards without weights, a user's own functions, and servers.

A reward is a name in the table below and a factory in its own file; adding one is one file and one line. Nothing heavy
is imported before a reward is loaded, so the names are there for a help text or a dry run.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tdpo_cli.errors import RequestError, RewardError
from tdpo_cli.sandbox import ZOO

if TYPE_CHECKING:
    from torch import Tensor

    from tdpo_cli.rewards.backbones import Backbones

LEARNED = ("aesthetic", "pickscore", "hpsv2", "imagereward")  # the four reward models; the sandbox has a checkpoint of each, under its name
VARIANTS = ("tdpo", "package")  # as the official TDPO computes a score, as the reward's own package does


class Reward(Protocol):
    """A scorer of images. Frozen; lives where its backbones live."""

    name: str
    needs_prompt: bool

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] float in [0,1], one prompt each -> [b] float32 on the images' device.

        A reward without needs_prompt does not read the prompts. The four reward models give finite scores on finite
        images; a custom reward's NaN comes back as it is, for the caller to judge.
        """

    def describe(self) -> dict[str, Any]:
        """checkpoint, sha256 (file -> hex digest), variant, preprocessing, scale: what a score's reader must know."""


# name -> (module, factory, whether the score depends on the prompt)
_REWARDS = {
    "aesthetic": ("tdpo_cli.rewards.aesthetic", "aesthetic", False),
    "pickscore": ("tdpo_cli.rewards.pickscore", "pickscore", True),
    "hpsv2": ("tdpo_cli.rewards.hpsv2", "hpsv2", True),
    "hpsv2.1": ("tdpo_cli.rewards.hpsv2", "hpsv2_1", True),
    "imagereward": ("tdpo_cli.rewards.imagereward", "imagereward", True),
    "jpeg-compressibility": ("tdpo_cli.rewards.simple", "jpeg_compressibility", False),
    "jpeg-incompressibility": ("tdpo_cli.rewards.simple", "jpeg_incompressibility", False),
    "gold": ("tdpo_cli.rewards.simple", "gold", True),
    "ocr": ("tdpo_cli.rewards.ocr", "ocr", True),
    "safety": ("tdpo_cli.rewards.safety", "safety", False),
}

# their score also takes uint8 levels in place of floats, with the same result
TAKES_LEVELS = frozenset({*LEARNED, "hpsv2.1", "jpeg-compressibility", "jpeg-incompressibility"})


def names() -> tuple[str, ...]:
    """The built-in rewards."""
    return tuple(_REWARDS)


def check_name(name: str) -> None:
    """RewardError, with a suggestion, unless `name` is built in or has the form of a custom reward or of a server's address."""
    from tdpo_cli.rewards import protocol

    if protocol.is_address(name):
        protocol.address(name)
        return
    if name in _REWARDS or ":" in name:
        return
    close = difflib.get_close_matches(name.lower(), _REWARDS, n=1, cutoff=0.4)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    raise RewardError(
        f"unknown reward {name!r}.{suggestion} Built in: {', '.join(_REWARDS)}; your own: module:function or path/file.py:function; "
        "a server: http://HOST:PORT/PATH."
    )


def short_name(name: str) -> str:
    """For tables and figures: a user's own reward without its folders, a server's as REWARD@HOST:PORT. Files hold the whole name."""
    from tdpo_cli.rewards import protocol

    if protocol.is_address(name):
        where = protocol.address(name)
        return f"{where.path.rpartition('/')[2]}@{where.host}:{where.port}"
    return name.rpartition("/")[2]


def reaches_outside(name: str) -> str | None:
    """What using this reward does beyond computing with what tdpo brings: "run code", "send pictures to HOST", or None.

    For names that somebody else wrote, such as those of a run's preset.json. Nothing is imported or sent to find out.
    """
    from tdpo_cli.rewards import protocol

    if name in _REWARDS:
        return None
    return f"send pictures to {protocol.address(name).host}" if protocol.is_address(name) else "run code"


def check_trusted(names: Iterable[str], named: Iterable[str], source: str) -> None:
    """RequestError for a reward that is not built in and that only a file from elsewhere names: code, or a place for pictures, of that file's choice.

    `named` are the rewards that the command line names, or a preset that it names; `source` is the file.
    """
    named = set(named)
    for name in names:
        if name not in named and (act := reaches_outside(name)):
            raise RequestError(
                f"{source} names the reward {name!r}, which is not built in: it would {act} that the run folder chooses. If you trust it, add "
                "--trust-rewards, or name the same reward on the command line."
            )


def checkpoints(zoo: str | None, given: Mapping[str, str]) -> dict[str, str]:
    """Reward name -> checkpoint: the zoo's, then what was given by hand. Names of neither mean the published ones."""
    embedded = {name: str(ZOO / name) for name in LEARNED} if zoo == "sandbox" else {}
    for name in given:
        check_name(name)
    return {**embedded, **given}


def needs_prompt(name: str) -> bool:
    """Whether the reward's score depends on the prompt, known without loading its weights; a server is asked."""
    check_name(name)
    if name in _REWARDS:
        return _REWARDS[name][2]
    return _from_elsewhere(name).needs_prompt


def load(name: str, backbones: Backbones, *, checkpoint: str | None = None, variant: str = "tdpo") -> Reward:
    """The reward called `name`, on the backbones' device and in their precision.

    `checkpoint` is a local path or a hub id, None for the published one. Rewards of one `backbones` share the networks
    that are the same. Raises RewardError.
    """
    check_name(name)
    if variant not in VARIANTS:
        raise RewardError(f"unknown variant {variant!r} of reward {name}: expected {' or '.join(VARIANTS)}")
    if name in _REWARDS:
        module, factory, _ = _REWARDS[name]
        return getattr(importlib.import_module(module), factory)(backbones, checkpoint, variant)
    if checkpoint is not None:
        raise RewardError(f"{name} is a custom reward and takes no checkpoint (got {checkpoint})")
    return _from_elsewhere(name)


def _from_elsewhere(name: str) -> Reward:
    """A user's own function, or a server."""
    from tdpo_cli.rewards import custom, protocol, remote

    return remote.HttpReward(name) if protocol.is_address(name) else custom.custom(name)
