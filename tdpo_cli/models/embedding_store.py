"""Text embeddings on disk: FOLDER/MODEL/PROMPT.safetensors, a file per prompt. Several processes and runs may share the folder.

MODEL and PROMPT are digests. A file is whole or not there; what does not fit its own SHA-256 is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.storage import disk
from tdpo_cli.storage.run_dir import hash_file

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # how the hub's cache calls a file: by its content


def place() -> Path:
    """TDPO_CACHE, else tdpo/ in the user's folder of caches."""
    own = os.environ.get("TDPO_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(caches) / "tdpo") / "embeddings"


class Damaged(Exception):
    """A file that is not what was written."""


class Store:
    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, model: str, prompt: str) -> Path:
        return self.folder / model[:32] / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def read(self, model: str, prompt: str) -> dict[str, Tensor] | None:
        """The tensors of a prompt, mapped from the file, so that processes share their memory; None: not there. Raises Damaged."""
        path = self.file(model, prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as opened:
                said, parts = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}
            if (said.get("model"), said.get("prompt"), said.get("sha256")) != (model, prompt, digest(parts)):
                raise Damaged(f"{path}: not what was written")
            with contextlib.suppress(OSError):
                os.utime(path)  # what was not used for the longest time is removed first
        except FileNotFoundError:  # another run has just removed it
            return None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise Damaged(f"{path}: {error}") from None
        return parts

    def write(self, model: str, prompt: str, parts: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a prompt. Raises WorkError, RequestError."""
        parts = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
        with disk.whole(self.file(model, prompt), shared=True) as aside:
            save_file(parts, aside, {"model": model, "prompt": prompt, "sha256": digest(parts)})

    def make_room(self, needed: int, limit: int, keep: Collection[Path]) -> None:
        """Remove what was not used for the longest time, until `needed` more bytes stay within the limit; `keep` stays."""
        found = []
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):  # removed by another run meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) + needed - limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            if path not in keep:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                excess -= size

    # --- what a model is --------------------------------------------------------------------------------------------------
    def file_digests(self, files: Iterable[Path]) -> dict[str, str]:
        """File name -> digest of the content. The hub's cache names files so; others are read once, until size or time change."""
        memo, known, before = self.folder / "digests.json", {}, {}
        with contextlib.suppress(FileNotFoundError, RequestError):
            before = disk.read_json(memo, dict)
        digests = {}
        for file in files:
            real, status = file.resolve(), file.stat()
            if real.parent.name == "blobs" and BLOB.fullmatch(real.name):
                digests[file.name] = real.name
                continue
            entry = before.get(str(real))
            if not (isinstance(entry, list) and entry[:2] == [status.st_size, status.st_mtime_ns] and len(entry) == 3):
                entry = known[str(real)] = [status.st_size, status.st_mtime_ns, hash_file(real)]
            digests[file.name] = str(entry[2])
        if known:
            with contextlib.suppress(WorkError, RequestError):
                disk.write_text(memo, json.dumps(before | known, indent=1) + "\n", shared=True)
        return digests


def digest(parts: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, types, shapes and numbers."""
    whole = hashlib.sha256()
    for name, part in sorted(parts.items()):
        whole.update(f"{name} {part.dtype} {list(part.shape)}\n".encode())
        whole.update(part.contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()
