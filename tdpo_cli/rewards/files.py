"""Find a checkpoint's files, locally or on the hub, read them as plain weights, and say clearly when that fails."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdpo_cli.errors import RewardError, first_line


# --- where ------------------------------------------------------------------------------------------------------------
def is_local(source: str | Path) -> bool:
    """Whether `source` means a path; else it is a hub id `owner/name`.

    What exists is a path. What does not is still meant as one unless it looks exactly like a hub id.
    """
    text = os.path.expanduser(source)
    if os.path.exists(text):
        return True
    parts = text.split("/")
    looks_like_id = len(parts) == 2 and all(parts) and parts[0].strip("._-") and "\\" not in text
    return not looks_like_id or text.endswith((".pt", ".pth", ".bin", ".safetensors", ".json"))


def find(source: str | Path, *candidates: str, needed_by: str, fetch: str = "") -> Path:
    """The first of `candidates` (file names) that `source`, a folder or a hub id, holds.

    `fetch` is what to download where a folder lacks it: a hub id, or a hub id and a file. Raises RewardError: names the
    file, where it was looked for, and the command that fetches it.
    """
    if not is_local(source):
        return _from_hub(str(source), candidates, needed_by)
    folder = Path(source).expanduser()
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    state = "it is not there" if folder.is_dir() else "there is no such folder"
    raise RewardError(
        f"{needed_by} needs {' or '.join(candidates)}, looked for in {folder}: {state}. Fetch it with: hf download {fetch} --local-dir {folder}"
    )


def find_optional(source: str | Path, *candidates: str) -> Path | None:
    """As `find`, but None where the file is missing."""
    try:
        return find(source, *candidates, needed_by="")
    except RewardError:
        return None


def _from_hub(hub_id: str, candidates: tuple[str, ...], needed_by: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    reason = "the hub has no such file"
    for name in candidates:
        try:
            return Path(hf_hub_download(hub_id, name))
        except LocalEntryNotFoundError:  # a subclass of the next: the file may exist, but the hub was not reached
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = first_line(error)
    raise RewardError(
        f"{needed_by} needs {' or '.join(candidates)} of {hub_id}, looked for in {constants.HF_HUB_CACHE} and on the "
        f"hub: {reason}. There is no local folder {hub_id} either. Fetch it with: hf download {hub_id} {candidates[0]}"
    )


# --- what -------------------------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RewardError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise RewardError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU from .safetensors or a pickled .pt/.pth/.bin, unwrapped from `{"state_dict": ...}`.

    Pickles load with `weights_only=True` and nothing else: a pickle can run any code. Raises RewardError with the file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # map_location: the LAION head was saved from a GPU. Mapping the file saves a second copy of it in memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise RewardError(
            f"{path} was refused: it does not load as plain weights (weights_only=True, as a pickle can run any code). "
            f"Fetch the file again or convert it to safetensors. Reason: {first_line(error)}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"{path} should hold a dict of tensors, but holds a {type(content).__name__}")
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy `state` into `module`, every key and shape as expected. Raises RewardError naming the file and the keys."""
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unknown or wrong:
        shapes = [f"{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}" for key in wrong]
        raise RewardError(f"{path} does not fit {type(module).__name__}: " + summary(missing, unknown, shapes))
    module.load_state_dict(state)


def summary(missing: list[str], unknown: list[str], shapes: list[str]) -> str:
    """At most three of each complaint, with the count."""
    parts = []
    for title, items in (("missing keys", missing), ("wrong shapes", shapes), ("unknown keys", unknown)):
        if items:
            more = ", ..." if len(items) > 3 else ""
            parts.append(f"{len(items)} {title} ({', '.join(items[:3])}{more})")
    return "; ".join(parts)


def fingerprints(*paths: Path) -> dict[str, str]:
    """File -> SHA-256, hex; each computed once as long as the file does not change."""
    digests = {}
    for path in paths:
        status = path.stat()
        digests[str(path)] = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    return digests


@cache
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- building without noise -------------------------------------------------------------------------------------------
class _NoDraws(TorchFunctionMode):
    """Leave new parameters as they are: all are read from a file next, and a ViT-H's billion takes 20 s."""

    _INITIALISERS = frozenset({nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].zero_()  # not nothing: a truncated normal draws again until its values lie within bounds
        return function(*args, **(kwargs or {}))


@contextmanager
def building() -> Iterator[None]:
    """Build a network that `fill` will fill: no random values, no log lines or progress bars of transformers."""
    with _NoDraws(), quiet_transformers():
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and progress bars; what matters is checked and raised by the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
