"""The folder of a cross-evaluation: what was asked, the parts that are done, the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.errors import RequestError
from tdpo_cli.overoptimisation import held_out
from tdpo_cli.storage import disk

Part = tuple[int, int, int]  # number of the model, first prompt, end


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    disk.write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


class Folder:
    """OUT: request.json, parts/ until all is done, images/, and then cross_eval.json with what is drawn from it."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    @property
    def result(self) -> Path:
        return self.path / "cross_eval.json"

    # --- the request ----------------------------------------------------------------------------------------------------
    def read_request(self) -> dict[str, Any] | None:
        """What this folder was begun with; None if nothing is there yet. Raises RequestError."""
        file = self.path / "request.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise RequestError(f"{self.path} holds other things; choose another --out.") from None
            return None
        except (OSError, ValueError) as error:
            raise RequestError(f"{file}: damaged: {error}. Choose another --out.") from None

    def lock(self) -> None:
        """Make the folder, and refuse a second process in it. Raises RequestError."""
        self._lock = self._lock or disk.lock(self.path, "at work")

    def begin(self, request: dict[str, Any]) -> None:
        write_json(self.path / "request.json", request, indent=1)

    def read_result(self) -> dict[str, Any]:
        """The content of cross_eval.json, also of one that an earlier version wrote. Raises RequestError."""
        try:
            return held_out.read(json.loads(self.result.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RequestError(f"{self.result}: damaged: {error}. Remove it together with the folder, or choose another --out.") from None

    # --- parts ----------------------------------------------------------------------------------------------------------
    def part(self, model: str, first: int) -> Path:
        return self.path / "parts" / model / f"{first:05d}.json"

    def missing(self, models: Sequence[str], prompts: int, at_once: int) -> list[Part]:
        """Which pieces are still to be done, in the order of the models."""
        pieces = [(m, first, min(first + at_once, prompts)) for m in range(len(models)) for first in range(0, prompts, at_once)]
        return [piece for piece in pieces if not self.part(models[piece[0]], piece[1]).exists()]

    def read_parts(self, model: str, prompts: int, at_once: int) -> list[dict[str, Any]]:
        return [json.loads(self.part(model, first).read_text(encoding="utf-8")) for first in range(0, prompts, at_once)]

    def forget_parts(self) -> None:
        """Once the result holds them."""
        shutil.rmtree(self.path / "parts", ignore_errors=True)
