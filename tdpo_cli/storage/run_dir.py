"""The run folder: preset.json, env.json, metrics.jsonl, log.txt, images, checkpoints, and the state a resume needs.

It may be damaged, or a stranger's. `RunDir` is its only reader: what it returns is checked, everything else is a RequestError.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tdpo_cli.config.fields import named
from tdpo_cli.config.preset import from_dict
from tdpo_cli.config.settings import RESUMABLE, Preset
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.storage import disk

STATES_KEPT = 2
FOLDERS = ("state", "checkpoints", "images")
FILES = (".lock", "preset.json", "env.json", "metrics.jsonl", "log.txt", "report.html")
LARGEST = 1e100  # of a number in metrics: far beyond what fp32 holds, and its square is still finite


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
        """Refuse links and a second run in this folder, then sweep up what a killed one left half-written. Raises RequestError."""
        if self._lock is not None:
            return
        self.refuse_links()
        self._lock = disk.lock(self.path, "training")
        for place in (self.path, *(self.path / name for name in FOLDERS)):
            for leftover in place.glob(".*.tmp"):
                disk.remove(leftover)

    @property
    def _top(self) -> Path | None:
        """What is not made anew: the folder of a run that this process trains."""
        return self.path if self._lock else None

    def refuse_links(self) -> None:
        """RequestError where a place that a run writes to is a link."""
        disk.refuse_links(self.path, (*FILES, *FOLDERS))
        for name in ("state", "checkpoints"):
            disk.refuse_links(self.path / name, (folder.name for folder in numbered(self.path / name)))

    def still_there(self) -> None:
        """WorkError where the folder that this process locked was removed, moved or replaced: nothing that is written there could be resumed."""
        if self._lock is None:
            return
        if not disk.is_locked_by(self.path, self._lock) or not self.holds_a_run:
            raise WorkError(f"{self.path}: the run folder was removed, moved or replaced while the run trained. Nothing more is written there.")

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

    def change_preset(self, preset: Preset) -> None:
        """Write what a resumed run may change, and leave the rest of preset.json as it is, keys of another version too."""
        table = self._preset_table()
        for key in RESUMABLE:
            section, _, name = key.partition(".")
            value = preset.as_dict()[section][name]
            if name in table.get(section, {}) or value != getattr(getattr(Preset(), section), name):
                table.setdefault(section, {})[name] = value
        disk.write_text(self.path / "preset.json", json.dumps(table, indent=2) + "\n")

    def read_preset(self) -> Preset:
        return from_dict(self._preset_table(), where=str(self.path / "preset.json"))

    def _preset_table(self) -> dict[str, Any]:
        try:
            return disk.read_json(self.path / "preset.json", dict)
        except FileNotFoundError:
            raise RequestError(f"{self.path}: no run there (preset.json is missing).") from None

    def settings_digest(self) -> str | None:
        """SHA-256 of preset.json as it is on the disk, without what a resume may change; a newer version's new keys do not change it.

        None without a preset.json.
        """
        if not self.holds_a_run:
            return None
        table = self._preset_table()
        for key in RESUMABLE:
            section, _, name = key.partition(".")
            if isinstance(table.get(section), dict):
                table[section].pop(name, None)
        return _digest(table)

    def read_environments(self) -> list[dict[str, Any]]:
        """One entry per start or resume, each with a usable plan. Raises RequestError."""
        file = self.path / "env.json"
        advice = " A resume reads the micro-batch from its last entry."
        try:
            entries = disk.read_json(file, list, advice)
        except FileNotFoundError:
            return []
        for entry in entries:
            if not isinstance(entry, dict) or not _is_plan(entry.get("plan", {"micro_batch": entry.get("micro_batch", 1)})):
                raise RequestError(f"{file}: damaged: an entry is not what a run writes there.{advice}")
        return entries

    def add_environment(self, entry: dict[str, Any]) -> None:
        """One entry per start or resume."""
        disk.write_text(self.path / "env.json", json.dumps([*self.read_environments(), entry], indent=2) + "\n")

    # --- metrics --------------------------------------------------------------------------------------------------------
    def read_metrics(self, rewards: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, their epochs ascending; a torn last line does not count.

        `rewards` are those whose columns every row must have. Raises RequestError for a damaged line.
        """
        columns = [f"rewards/{name}/{figure}" for name in rewards for figure in ("mean", "std")]
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(self._metric_lines(), 1):
            try:
                row = json.loads(line)
                problem = _row_problem(row, rows, columns)
            except (ValueError, RecursionError) as error:
                problem = first_line(error)
            if problem is not None:
                raise RequestError(f"{self.path / 'metrics.jsonl'}: line {number} is damaged ({problem}); tdpo train --resume repairs it.")
            rows.append(row)
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Append one epoch, or nothing of it. NaN and infinity become null."""
        self.still_there()
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
        """Drop the rows of epochs that will be run again; repair what is damaged from the copy in the state before them."""
        file, lines = self.path / "metrics.jsonl", self._metric_lines()
        copy = self.path / "state" / epoch_name(first_epoch - 1) / "metrics.jsonl"
        if copy.exists():
            wanted = copy.read_text().splitlines(keepends=True)
            bad = next((i for i, line in enumerate(wanted) if lines[i : i + 1] != [line]), None)
            if bad is not None:
                warn(f"{file}: line {bad + 1} is {'damaged' if bad < len(lines) else 'missing'}; repaired from the copy in {copy.parent}.")
        else:
            wanted = [json.dumps(row) + "\n" for row in self.read_metrics() if row["epoch"] < first_epoch] if first_epoch else []
        disk.write_text(file, "".join(wanted))

    def missing(self, rows: Sequence[dict[str, Any]], previews: bool) -> list[str]:
        """What a page drawn from `rows` would silently lack: epochs that a state has, what the run ran on, whole previews of the epochs."""
        found = []
        for folder in epochs_in(self.path / "state")[-1:]:
            kept, lines = _whole_lines(folder / "metrics.jsonl"), self._metric_lines()
            if lost := sum(lines[i : i + 1] != [line] for i, line in enumerate(kept)):
                found.append(f"metrics.jsonl: {lost} of {len(kept)} epochs are missing or differ from the copy in {folder.name}'s state")
        if rows and not (self.path / "env.json").exists():
            found.append("env.json is missing: what the run ran on is not known")
        torn = [name for row in rows if not _is_whole_png(self.path / "images" / (name := f"{epoch_name(row['epoch'])}.png"))] if previews else []
        if torn:
            found.append(f"images: {len(torn)} previews are missing or damaged, {torn[0]} first")
        return found

    def _metric_lines(self) -> list[str]:
        return _whole_lines(self.path / "metrics.jsonl")

    # --- images ---------------------------------------------------------------------------------------------------------
    def save_image(self, name: str, image: Any) -> None:
        """images/NAME, whole or not at all."""
        self.still_there()
        with disk.whole(self.path / "images" / name, inside=self._top) as aside:
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
        for folder in numbered(self.path / "state")[::-1]:
            problem = damage(folder)
            if problem is None:
                manifest = Manifest.read(folder)
                self._must_be_of_this_preset(folder, manifest)
                try:
                    state, epoch = torch.load(folder / "state.pt", map_location="cpu", weights_only=True), manifest.epoch
                except Exception as error:  # noqa: BLE001 - pickle, zip and torch each raise their own
                    raise RequestError(f"{folder / 'state.pt'}: damaged, not plain weights: {first_line(error)[:200]}") from None
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

    def _must_be_of_this_preset(self, folder: Path, manifest: Manifest) -> None:
        """RequestError where preset.json was changed since that state was saved, other than what a resume may change.

        Version 0.1 recorded only the whole preset's digest, run.epochs included, so the earlier numbers of epochs are tried too; a
        state that fits is given what this version records, because a resume may change the rest.
        """
        now = self.settings_digest()
        if manifest.settings is None and manifest.preset is not None and now is not None:
            table = self._preset_table()
            epochs = table.get("run", {}).get("epochs", 0)
            tried = (manifest.epoch + 1, *range(epochs, manifest.epoch, -1)) if isinstance(epochs, int) else ()
            same = any(_digest({**table, "run": {**table["run"], "epochs": count}}) == manifest.preset for count in tried[:100_000])
            if same or not _is_digest(manifest.preset):
                with disk.failures(self.path):
                    manifest.add_settings(folder, now)
                return
        elif manifest.settings == now:
            return
        raise RequestError(
            f"{self.path / 'preset.json'}: changed since {folder.name} was saved: the run would go on as another one. Put the old values back, or "
            f"start a new run with the new ones: tdpo train --preset {self.path / 'preset.json'} --out OTHER"
        )

    @contextlib.contextmanager
    def _folder(self, target: Path, epoch: int, digest: str) -> Iterator[Path]:
        """Written aside, hashed, synced, renamed: a folder of that name is either whole or not there."""
        self.still_there()
        aside = disk.aside_of(target)
        disk.remove(aside)
        with disk.failures(self.path), disk.nothing_left(aside):
            disk.make_below(self._top, aside)
            yield aside
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            for path in files:
                path.chmod(disk.MODE)  # safetensors' own files are for their owner only
            manifest = {
                "epoch": epoch,
                "preset": digest,
                "settings": self.settings_digest(),
                "files": {str(path.relative_to(aside)): hash_file(path) for path in files},
            }
            disk.write_text(aside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            for path in files:
                disk.sync(path)
            for folder in (path for path in aside.rglob("*") if path.is_dir()):
                disk.sync(folder)
            disk.sync(aside)
            disk.remove(target)  # an epoch that is run again
            aside.rename(target)
            disk.sync(target.parent)

    # --- reading checkpoints --------------------------------------------------------------------------------------------
    def saved_epochs(self) -> list[int]:
        """The epochs whose checkpoints are there, in order."""
        return [int(folder.name.removeprefix("epoch_")) for folder in epochs_in(self.path / "checkpoints")]

    def checkpoint(self, epoch: int | None = None) -> Path:
        """The folder of that epoch, or of the last one, whole by its manifest. Raises RequestError for one that is not."""
        folders = numbered(self.path / "checkpoints")
        if not folders:
            raise RequestError(f"{self.path}: no checkpoint there yet.")
        wanted = folders[-1] if epoch is None else self.path / "checkpoints" / epoch_name(epoch)
        if wanted not in folders:
            raise RequestError(f"{self.path}: no checkpoint of epoch {epoch}. There are: {', '.join(f.name for f in folders)}.")
        check_weights(wanted, must_have_manifest=True)
        return wanted

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first, each whole by its manifest. Raises RequestError for one that is not."""
        folders = numbered(self.path / "checkpoints")
        for folder in folders:
            check_weights(folder, must_have_manifest=True)
        return folders


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file that end; none where it is not there. Raises RequestError."""
    try:
        # a flipped bit may be no UTF-8 any more: such a line is damaged, not the end of reading
        text = disk.read_bytes(file).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line + "\n" for line in text.split("\n")[:-1]]  # behind the last newline: nothing, or a torn line


def _is_whole_png(file: Path) -> bool:
    try:
        content = disk.read_bytes(file)
    except (FileNotFoundError, RequestError):
        return False
    return content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")


def epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def epochs_in(folder: Path) -> list[Path]:
    """The whole folders of epochs, oldest first."""
    return [path for path in numbered(folder) if (path / "manifest.json").exists()]


def numbered(folder: Path) -> list[Path]:
    """The folders of epochs, whole or not, oldest first."""
    numbers = {path: re.fullmatch(r"epoch_([0-9]{1,9})", path.name) for path in folder.glob("epoch_*")}
    named = {path: int(found.group(1)) for path, found in numbers.items() if found is not None}
    return sorted(named, key=named.__getitem__)  # by number: epoch_10000 follows epoch_9999


# --- manifests --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Manifest:
    """What a state or checkpoint folder holds, as manifest.json lists it."""

    epoch: int
    files: dict[str, str]  # path inside the folder -> SHA-256
    preset: str | None  # digest of the whole preset
    settings: str | None  # RunDir.settings_digest of that time; None in version 0.1

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises RequestError for a manifest that is missing or damaged, or that lists files outside the folder."""
        file = folder / "manifest.json"
        try:
            content = disk.read_json(file, dict)
        except FileNotFoundError:
            raise RequestError(f"{file} is missing") from None
        epoch, files = content.get("epoch"), content.get("files")
        if type(epoch) is not int or not 0 <= epoch < 10**9 or not isinstance(files, dict):
            raise RequestError(f"{file}: damaged: no epoch or no list of files in it")
        for name, digest in files.items():
            if not isinstance(digest, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise RequestError(f"{file}: damaged: it lists {named(name)}, which is not a file of this folder")
        texts = (content.get(key) if isinstance(content.get(key), str) else None for key in ("preset", "settings"))
        return Manifest(epoch, files, *texts)

    def add_settings(self, folder: Path, digest: str) -> None:
        """Record the digest that version 0.1 did not."""
        content = disk.read_json(folder / "manifest.json", dict)
        disk.write_text(folder / "manifest.json", json.dumps({**content, "settings": digest}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a state or checkpoint folder, by its manifest; None if nothing is."""
    try:
        manifest = Manifest.read(folder)
    except RequestError as error:
        return f"{folder / 'manifest.json'} is damaged ({error})"
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        try:
            if hash_file(folder / name) != expected:
                return f"{folder / name} is damaged (its hash differs from the manifest)"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
    if folder.name.startswith("epoch_") and folder.name != epoch_name(manifest.epoch):
        return f"{folder / 'manifest.json'} is damaged (it names epoch {manifest.epoch})"
    return None


def check_weights(path: Path, must_have_manifest: bool = False) -> None:
    """RequestError where a checkpoint folder, or a file in one, is not what its manifest says. Without a manifest nothing is known.

    Every reader of weights comes through here; what was compared is compared again only when a file has changed.
    """
    folder = path if path.is_dir() else path.parent
    manifest = folder / "manifest.json"
    if not manifest.exists() and must_have_manifest:
        others = ", ".join(other.name for other in epochs_in(folder.parent)) or "none"
        raise RequestError(f"{manifest} is missing, so this checkpoint is damaged. Choose another one with --epoch. There are: {others}.")
    if path.is_file() and manifest.is_file() and path.name not in Manifest.read(folder).files:
        return  # a file of its own in the folder
    if manifest.exists() and (problem := _damage_of(folder.resolve(), _signature(folder))):
        raise RequestError(f"{problem.replace(str(folder.resolve()), str(folder))}. Choose another checkpoint, or copy this one again.")


def _signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file of a folder does."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((str(path), status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found)


@cache
def _damage_of(folder: Path, signature: object) -> str | None:
    return damage(folder)


def rewrite(folder: Path, name: str, text: str) -> None:
    """Replace a text file of a state or checkpoint folder, then its hash in the manifest, each whole or not at all. Raises WorkError.

    Stopped in between, that one file counts as damaged, until it is replaced once more.
    """
    Manifest.read(folder)
    disk.refuse_links(folder.parent.parent, [folder.parent.name, f"{folder.parent.name}/{folder.name}", f"{folder.parent.name}/{folder.name}/{name}"])
    manifest = disk.read_json(folder / "manifest.json", dict)
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
    for old in numbered(folder)[:-keep]:
        if spare is None or old.name != epoch_name(spare):
            disk.remove(old)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _is_plan(plan: Any) -> bool:
    """Whether this is a plan of machine/memory.py: positive sizes, switches, no other keys."""
    sizes, switches = {"micro_batch", "sample_batch", "decode_chunk"}, {"checkpointing", "park", "offload"}
    if not isinstance(plan, dict) or not set(plan) <= sizes | switches:
        return False
    if not all(type(value) is bool if key in switches else type(value) is int and 0 < value < 10**9 for key, value in plan.items()):
        return False
    return set(plan) == {"micro_batch"} or sizes <= set(plan)


def _row_problem(row: Any, before: Sequence[dict[str, Any]], columns: Sequence[str]) -> str | None:
    """What is wrong with a row of metrics; None if nothing is."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or not 0 <= row["epoch"] < 10**9:
        return "no epoch in it"
    if before and row["epoch"] <= before[-1]["epoch"]:
        return f"epoch {row['epoch']} follows epoch {before[-1]['epoch']}"
    if (lost := next((name for name in columns if name not in row), None)) is not None:
        return f"{named(lost)} is missing"
    for name, value in row.items():
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, (int, float)) and abs(number) >= LARGEST:  # NaN is read, as a missing value
                return f"{named(name)} is out of range"
            if not isinstance(number, (int, float, type(None))):
                return f"{named(name)} is not a number"
    return None
