"""The run folder: preset.json, env.json, metrics.jsonl, log.txt, images, checkpoints, and the state a resume needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdpo_cli.config.preset import Preset, from_dict
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.storage import disk

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
        """Refuse a second run in this folder, then sweep up what a killed one left half-written. Raises RequestError."""
        if self._lock is not None:
            return
        self._lock = disk.lock(self.path, "training")
        for place in (self.path, *(self.path / name for name in ("state", "checkpoints", "images"))):
            for leftover in place.glob(".*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

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
        disk.make(self.path)
        disk.write_text(self.path / "preset.json", json.dumps(preset.as_dict(), indent=2) + "\n")

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
        try:
            return json.loads(file.read_text()) if file.exists() else []
        except ValueError as error:
            raise RequestError(f"{file}: damaged: {error}. A resume reads the micro-batch from its last entry.") from None

    def add_environment(self, entry: dict[str, Any]) -> None:
        """One entry per start or resume."""
        disk.write_text(self.path / "env.json", json.dumps([*self.read_environments(), entry], indent=2) + "\n")

    # --- metrics --------------------------------------------------------------------------------------------------------
    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a torn last line is no line. Raises WorkError for a damaged one."""
        rows = []
        for number, line in enumerate(self._metric_lines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise WorkError(f"{self.path / 'metrics.jsonl'}: line {number} is damaged; tdpo train --resume mends it.") from None
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Append one epoch, or nothing of it. NaN and infinity become null."""
        file = self.path / "metrics.jsonl"
        before = file.stat().st_size if file.exists() else 0
        with disk.failures(self.path):
            try:
                with open(file, "a") as out:
                    out.write(json.dumps(_finite(row)) + "\n")
                    out.flush()
                    os.fsync(out.fileno())
            except OSError:
                os.truncate(file, before)
                raise

    def take_back_metrics(self, first_epoch: int, warn: Callable[[str], None] = lambda text: None) -> None:
        """Drop the rows of epochs that will be run again; mend what is damaged from the copy in the state before them."""
        file, lines = self.path / "metrics.jsonl", self._metric_lines()
        copy = self.path / "state" / epoch_name(first_epoch - 1) / "metrics.jsonl"
        if copy.exists():
            wanted = copy.read_text().splitlines(keepends=True)
            bad = next((i for i, line in enumerate(wanted) if lines[i : i + 1] != [line]), None)
            if bad is not None:
                warn(f"{file}: line {bad + 1} is {'damaged' if bad < len(lines) else 'missing'}; mended from the copy in {copy.parent}.")
        else:
            wanted = [json.dumps(row) + "\n" for row in self.read_metrics() if row["epoch"] < first_epoch] if first_epoch else []
        disk.write_text(file, "".join(wanted))

    def _metric_lines(self) -> list[str]:
        file = self.path / "metrics.jsonl"
        # a flipped bit may be no UTF-8 any more: such a line is damaged, not the end of reading
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        return [line + "\n" for line in text.split("\n")[:-1]]  # behind the last newline: nothing, or a torn line

    # --- images ---------------------------------------------------------------------------------------------------------
    def save_image(self, name: str, image: Any) -> None:
        """images/NAME, whole or not at all."""
        with disk.whole(self.path / "images" / name) as aside:
            image.save(aside, format="PNG")

    # --- state and checkpoints ------------------------------------------------------------------------------------------
    def save_state(self, epoch: int, state: dict[str, Any], digest: str) -> None:
        """What a resume needs after `epoch`, the metrics so far among it. The two newest are kept."""
        import torch

        with self._folder(self.path / "state" / epoch_name(epoch), epoch, digest) as folder:
            torch.save(state, folder / "state.pt")
            if (self.path / "metrics.jsonl").exists():
                shutil.copyfile(self.path / "metrics.jsonl", folder / "metrics.jsonl")
        _prune(self.path / "state", STATES_KEPT)

    def save_checkpoint(self, epoch: int, write: Callable[[Path], None], digest: str, keep_last: int | None, spare: int | None = None) -> Path:
        """`write(folder)` puts weights and model card there; a manifest with hashes is added. Epoch `spare` is kept besides."""
        target = self.path / "checkpoints" / epoch_name(epoch)
        with self._folder(target, epoch, digest) as folder:
            write(folder)
        if keep_last is not None:
            _prune(self.path / "checkpoints", keep_last, spare)
        return target

    def load_state(self, warn: Callable[[str], None] = lambda text: None) -> tuple[int, dict[str, Any]] | None:
        """(epoch, state) of the newest whole state; None if no epoch was finished. Raises WorkError if all are damaged."""
        import torch

        problems = []
        for folder in _numbered(self.path / "state")[::-1]:
            problem = damage(folder)
            if problem is None:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                epoch = json.loads((folder / "manifest.json").read_text())["epoch"]
                if problems:
                    warn(f"{'; '.join(problems)}. Going on from the state before, of epoch {epoch}: later epochs are run again.")
                return epoch, state
            problems.append(problem)
        if problems:
            raise WorkError(
                f"no state of this run is whole: {'; '.join(problems)}. "
                "A new run may start from one of its checkpoints: --set model.start_from=CHECKPOINT."
            )
        return None

    @contextlib.contextmanager
    def _folder(self, target: Path, epoch: int, digest: str) -> Iterator[Path]:
        """Written aside, hashed, synced, renamed: a folder of that name is either whole or not there."""
        aside = disk.aside_of(target)
        shutil.rmtree(aside, ignore_errors=True)
        with disk.failures(self.path), disk.nothing_left(aside):
            aside.mkdir(parents=True)
            yield aside
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            manifest = {
                "epoch": epoch,
                "preset": digest,
                "files": {str(path.relative_to(aside)): hash_file(path) for path in files},
            }
            disk.write_text(aside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            for path in files:
                disk.sync(path)
            for folder in (path for path in aside.rglob("*") if path.is_dir()):
                disk.sync(folder)
            disk.sync(aside)
            shutil.rmtree(target, ignore_errors=True)  # an epoch that is run again
            aside.rename(target)
            disk.sync(target.parent)

    # --- reading checkpoints --------------------------------------------------------------------------------------------
    def saved_epochs(self) -> list[int]:
        """The epochs whose checkpoints are there, in order."""
        return [int(folder.name.removeprefix("epoch_")) for folder in epochs_in(self.path / "checkpoints")]

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


def epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def epochs_in(folder: Path) -> list[Path]:
    """The whole folders of epochs, oldest first."""
    return [path for path in _numbered(folder) if (path / "manifest.json").exists()]


def _numbered(folder: Path) -> list[Path]:
    numbers = {path: path.name.removeprefix("epoch_") for path in folder.glob("epoch_*")}
    named = [path for path, number in numbers.items() if number.isdigit()]
    return sorted(named, key=lambda path: int(numbers[path]))  # by number: epoch_10000 follows epoch_9999


def damage(folder: Path) -> str | None:
    """What is wrong with a state or checkpoint folder, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if hash_file(folder / name) != expected:
                return f"{folder / name} is damaged (its hash differs from the manifest)"
        if folder.name.startswith("epoch_") and folder.name != epoch_name(manifest["epoch"]):
            return f"{folder / 'manifest.json'} is damaged (it speaks of epoch {manifest['epoch']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / 'manifest.json'} is damaged ({error})"
    return None


def rewrite(folder: Path, name: str, text: str) -> None:
    """Replace a text file of a state or checkpoint folder, then its hash in the manifest, each whole or not at all. Raises WorkError.

    Stopped in between, that one file counts as damaged, until it is replaced once more.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    disk.write_text(folder / name, text)
    manifest["files"][name] = hash_file(folder / name)
    disk.write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _prune(folder: Path, keep: int, spare: int | None = None) -> None:
    for old in _numbered(folder)[:-keep]:
        if spare is None or old.name != epoch_name(spare):
            shutil.rmtree(old)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
