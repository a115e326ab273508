"""The run folder: preset.json, env.json, metrics.jsonl, log.txt, images, checkpoints, and the state a resume needs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.preset import Preset, from_dict

STATES_KEPT = 2


class RunDir:
    """All writes of a run go through here, on the main process only."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    # --- starting -------------------------------------------------------------------------------------------------------
    @property
    def holds_a_run(self) -> bool:
        return (self.path / "preset.json").exists()

    def lock(self) -> None:
        """Refuse a second run in this folder. The kernel drops the lock when its owner dies. Raises RequestError."""
        self._make(self.path)
        self._lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{self.path}: another tdpo process is training in this folder.") from None

    def must_be_free(self) -> None:
        """Whether a new run can start here, without writing anything yet. Raises RequestError."""
        if self.holds_a_run:
            raise RequestError(f"{self.path} already holds a run. Continue it with --resume, or choose another --out.")
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise RequestError(f"{self.path}: cannot be written: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}.")

    def start(self, preset: Preset) -> None:
        self.must_be_free()
        self.write_preset(preset)

    def write_preset(self, preset: Preset) -> None:
        self._make(self.path)
        _write(self.path / "preset.json", json.dumps(preset.as_dict(), indent=2) + "\n")

    def read_preset(self) -> Preset:
        file = self.path / "preset.json"
        try:
            return from_dict(json.loads(file.read_text(encoding="utf-8")), where=str(file))
        except FileNotFoundError:
            raise RequestError(f"{self.path}: no run there (preset.json is missing).") from None
        except json.JSONDecodeError as error:
            raise RequestError(f"{file}: damaged: {error}") from None

    def read_environments(self) -> list[dict[str, Any]]:
        file = self.path / "env.json"
        return json.loads(file.read_text()) if file.exists() else []

    def add_environment(self, entry: dict[str, Any]) -> None:
        """One entry per start or resume."""
        _write(self.path / "env.json", json.dumps([*self.read_environments(), entry], indent=2) + "\n")

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{folder}: cannot be written: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise RequestError(f"{folder}: cannot be written: permission denied")

    # --- metrics --------------------------------------------------------------------------------------------------------
    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a torn last line is no line."""
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Append one epoch. NaN and infinity become null."""
        with _disk(self.path), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(_finite(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def take_back_metrics(self, first_epoch: int) -> None:
        """Drop the rows of epochs that will be run again."""
        rows = [row for row in self.read_metrics() if row["epoch"] < first_epoch]
        _write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    # --- state and checkpoints ------------------------------------------------------------------------------------------
    def save_state(self, epoch: int, state: dict[str, Any], digest: str) -> None:
        """What a resume needs after `epoch`. The two newest are kept."""
        import torch

        with self._folder(self.path / "state" / epoch_name(epoch), epoch, digest) as folder:
            torch.save(state, folder / "state.pt")
        _prune(self.path / "state", STATES_KEPT)

    def save_checkpoint(self, epoch: int, write: Callable[[Path], None], digest: str, keep_last: int | None) -> Path:
        """`write(folder)` puts weights and model card there; a manifest with hashes is added."""
        target = self.path / "checkpoints" / epoch_name(epoch)
        with self._folder(target, epoch, digest) as folder:
            write(folder)
        if keep_last is not None:
            _prune(self.path / "checkpoints", keep_last)
        return target

    def load_state(self) -> tuple[int, dict[str, Any]] | None:
        """(epoch, state) of the newest whole state; None if no epoch was finished. Raises WorkError if all are damaged."""
        import torch

        folders = epochs_in(self.path / "state")[::-1]
        problems = []
        for folder in folders:
            problem = damage(folder)
            if problem is None:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                return json.loads((folder / "manifest.json").read_text())["epoch"], state
            problems.append(problem)
        if problems:
            raise WorkError("no state of this run is whole: " + "; ".join(problems))
        return None

    @contextlib.contextmanager
    def _folder(self, target: Path, epoch: int, digest: str) -> Iterator[Path]:
        """Written aside, hashed, synced, renamed: a folder of that name is either whole or not there."""
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        with _disk(self.path):
            aside.mkdir(parents=True)
            yield aside
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            manifest = {
                "epoch": epoch,
                "preset": digest,
                "files": {str(path.relative_to(aside)): hash_file(path) for path in files},
            }
            _write(aside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            for path in files:
                _sync(path)
            _sync(aside)
            shutil.rmtree(target, ignore_errors=True)  # an epoch that is run again
            aside.rename(target)
            _sync(target.parent)

    # --- reading checkpoints --------------------------------------------------------------------------------------------
    def checkpoint(self, epoch: int | None = None) -> Path:
        """The folder of that epoch, or of the last one. Raises RequestError."""
        folders = epochs_in(self.path / "checkpoints")
        if not folders:
            raise RequestError(f"{self.path}: no checkpoint there yet.")
        if epoch is None:
            return folders[-1]
        wanted = self.path / "checkpoints" / epoch_name(epoch)
        if wanted not in folders:
            raise RequestError(f"{self.path}: no checkpoint of epoch {epoch}. There are: {', '.join(f.name for f in folders)}.")
        return wanted


def next_free(base: Path, name: str) -> Path:
    """`base/name-0001`, counting up."""
    number = 1
    while (base / f"{name}-{number:04d}").exists():
        number += 1
    return base / f"{name}-{number:04d}"


def epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def epochs_in(folder: Path) -> list[Path]:
    """The whole folders of epochs, oldest first."""
    numbers = {path: path.name.removeprefix("epoch_") for path in folder.glob("epoch_*") if (path / "manifest.json").exists()}
    whole = [path for path, number in numbers.items() if number.isdigit()]
    return sorted(whole, key=lambda path: int(numbers[path]))  # by number: epoch_10000 follows epoch_9999


def damage(folder: Path) -> str | None:
    """What is wrong with a state or checkpoint folder, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if hash_file(folder / name) != expected:
                return f"{folder / name} is damaged (its hash differs from the manifest)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / 'manifest.json'} is damaged ({error})"
    return None


def hash_file(path: Path) -> str:
    """SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _prune(folder: Path, keep: int) -> None:
    for old in epochs_in(folder)[:-keep]:
        shutil.rmtree(old)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with _disk(path.parent), open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk(where: Path) -> Iterator[None]:
    """A full or failing disk as one clear message."""
    try:
        yield
    except OSError as error:
        raise WorkError(f"{where}: writing failed: {error.strerror or error}. What was saved before is intact.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
