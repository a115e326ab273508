"""The folder of a cross-evaluation: what was asked, the parts that are done, the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from tdpo_cli.cross_eval.candidates import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.storage import disk

Part = tuple[int, int, int]  # number of the model, first prompt, end
DRAWN = tuple(f"cross_eval.{suffix}" for suffix in ("json", "csv", "md", "html", "png"))


class Folder:
    """OUT: request.json, parts/ until all is done, images/, and then cross_eval.json with what is drawn from it.

    It may be damaged, or a stranger's: what is read here is checked, and nothing is written through a link in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = None  # of this process, or another process's that is watched
        self._owned = False

    @property
    def result(self) -> Path:
        return self.path / "cross_eval.json"

    # --- the request ----------------------------------------------------------------------------------------------------
    def read_request(self) -> dict[str, Any] | None:
        """What this folder was begun with; None if nothing is there yet. Raises RequestError."""
        file, advice = self.path / "request.json", " Choose another --out."
        try:
            request = disk.read_json(file, dict, advice)
        except FileNotFoundError:
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise RequestError(f"{self.path} holds other things; choose another --out.") from None
            return None
        if problem := _request_problem(request):
            raise RequestError(f"{file}: damaged: {problem}.{advice}")
        return request

    def lock(self) -> None:
        """Make the folder, and refuse links in it and a second process. Raises RequestError."""
        if self._owned:
            return
        disk.refuse_links(self.path, ("request.json", "parts", "images", *DRAWN))
        for place in ("parts", "images"):
            for folder, names, _ in os.walk(self.path / place):
                disk.refuse_links(Path(folder), names)
        self._lock, self._owned = disk.lock(self.path, "at work"), True

    def watch(self) -> None:
        """In a process that shares the work of the one that holds the lock."""
        self._lock = self._lock or disk.watch(self.path)

    def still_there(self) -> None:
        """WorkError where the folder was removed, moved, emptied or replaced."""
        disk.still_there(self.path, self._lock if (self.path / "request.json").exists() else None)

    def begin(self, request: dict[str, Any]) -> None:
        self.write("request.json", json.dumps(request, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def write(self, name: str, content: str | bytes) -> None:
        """A file of the folder, whole or not at all. Raises WorkError."""
        disk.write_bytes(self.path / name, content.encode("utf-8") if isinstance(content, str) else content, inside=self.path)

    def write_result(self, content: Mapping[str, Any]) -> None:
        self.write("cross_eval.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def read_result(self) -> dict[str, Any]:
        """The content of cross_eval.json, also of one that an earlier version wrote. Raises RequestError."""
        from tdpo_cli.overoptimisation import held_out  # here, because it needs numpy, and a wrong request is answered without

        try:
            return held_out.read(disk.read_json(self.result, dict))
        except (OSError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise RequestError(f"{self.result}: damaged: {problem}. Remove it together with the folder, or choose another --out.") from None

    # --- parts ----------------------------------------------------------------------------------------------------------
    def part(self, model: str, first: int) -> Path:
        return self.path / "parts" / model / f"{first:05d}.json"

    def write_part(self, model: str, first: int, judged: Mapping[str, Any]) -> None:
        self.write(f"parts/{model}/{first:05d}.json", json.dumps(judged, ensure_ascii=False, allow_nan=False) + "\n")

    def missing(self, models: Sequence[str], prompts: int, at_once: int) -> list[Part]:
        """Which pieces are still to be done, in the order of the models."""
        pieces = [(m, first, min(first + at_once, prompts)) for m in range(len(models)) for first in range(0, prompts, at_once)]
        return [piece for piece in pieces if not self.part(models[piece[0]], piece[1]).exists()]

    def read_parts(self, model: str, task: Mapping[str, Any], at_once: int) -> list[dict[str, Any]]:
        """Raises RequestError for a part that is gone or damaged."""
        prompts, again = len(task["prompts"]), " Remove it: the same command makes it anew."
        parts = []
        for first in range(0, prompts, at_once):
            file = self.part(model, first)
            try:
                parts.append(disk.read_json(file, dict, again))
            except FileNotFoundError:
                raise RequestError(f"{file}: gone. The same command makes it anew.") from None
            if not _is_part(parts[-1], task["rewards"], min(at_once, prompts - first), task["per_prompt"]):
                raise RequestError(f"{file}: damaged: not the scores that belong there.{again}")
        return parts

    def forget_parts(self) -> None:
        """Once the result holds them."""
        shutil.rmtree(self.path / "parts", ignore_errors=True)


# --- what is read -------------------------------------------------------------------------------------------------------
def _request_problem(request: Mapping[str, Any]) -> str | None:
    """Why a request cannot be gone on with. What the command line names again is compared with it there; the models are checked here."""
    models, batch_size = request.get("models"), request.get("batch_size")
    if not isinstance(models, list) or not models or type(batch_size) is not int or batch_size < 1:
        return "it names no models, or no batch size"
    for entry in models:
        try:
            name = Model.of(entry).checked().name
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            return f"a model is not as tdpo writes it ({type(error).__name__}: {str(error)[:100]})"
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not name.isprintable() or name in ("", "."):
            return f"the model {name[:100]!r} would be written outside the folder"
    return None


def _is_part(part: Mapping[str, Any], rewards: Sequence[str], prompts: int, per_prompt: int) -> bool:
    """Whether these are scores and distances of so many images."""
    scores, distances = part.get("scores"), part.get("distances")
    if not isinstance(scores, dict) or set(scores) != set(rewards):
        return False
    rows = [row for column in scores.values() for row in (column if isinstance(column, list) and len(column) == prompts else [None])]
    if not all(isinstance(row, list) and len(row) == per_prompt and all(one is None or _is_number(one) for one in row) for row in rows):
        return False
    return distances is None or isinstance(distances, list) and len(distances) == prompts and all(map(_is_number, distances))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # no NaN either; statistics take squares of far smaller ones
