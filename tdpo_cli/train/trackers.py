"""Send what the run folder says of every epoch to TensorBoard and Weights & Biases, through accelerate's trackers.

metrics.jsonl and images/ stay the source: a tracker that was away is told at the next start what it does not know yet.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.storage.run_dir import RunDir, epoch_name


def check(names: Sequence[str]) -> None:
    """RequestError for a tracker whose package is not installed."""
    for name in names:
        if not _installed(name):
            raise RequestError(f"tracker {name} needs a package that is not installed: pip install {name}, or leave the tracker out.")


@contextlib.contextmanager
def started(preset: Preset, folder: RunDir, console: Console, is_main: bool = True) -> Iterator[Callable[[], None]]:
    """While inside, `catch_up()` sends the epochs of metrics.jsonl that a tracker of `run.trackers` does not know yet.

    The first call connects, so it comes once the run folder is there. What a tracker raises is a warning, said once; that
    tracker gets nothing more until the next start, and training goes on.
    """
    live: dict[str, Tracker | None] = dict.fromkeys(preset.run.trackers if is_main else ())

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a network or a disk that fails, in a library that has its own errors
            del live[name]
            reason = first_line(error, "no reason given").rstrip(".")
            console.warn(
                f"tracker {name} failed and gets nothing more from this start: {type(error).__name__}: {reason}. "
                "metrics.jsonl has every epoch; the next tdpo train --resume sends what is missing."
            )

    def tell(name: str) -> None:
        rows, tracker = folder.read_metrics(), live[name]
        if tracker is None:
            tracker = live[name] = TRACKERS[name](preset, folder.path, len(rows))
            console.say(f"tracking with {name}: {tracker.where}")
        for row in rows[tracker.upcoming :]:
            image = folder.path / "images" / f"{epoch_name(row['epoch'])}.png"
            tracker.log(row["epoch"], numbers(row), _pixels(image) if image.exists() else None)
            tracker.upcoming = row["epoch"] + 1

    def catch_up() -> None:
        for name in list(live):
            attempt(name, lambda name=name: tell(name))

    failed = True
    try:
        yield catch_up
        failed = False
    finally:
        for name, tracker in list(live.items()):
            if tracker is not None:
                attempt(name, lambda tracker=tracker: tracker.finish(failed))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The row as it is sent: what does not apply (null in metrics.jsonl) is left out."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def _pixels(file: Path) -> Any:
    """-> [H,W,3] uint8"""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec
        return False


# --- the trackers -----------------------------------------------------------------------------------------------------------
class Tracker(Protocol):
    """Made on the main process alone, with the number of epochs that are done."""

    upcoming: int  # the first epoch it does not know
    where: str  # for people: where to look

    def __init__(self, preset: Preset, run: Path, done: int): ...
    def log(self, epoch: int, values: Mapping[str, float], image: Any) -> None: ...  # image: [H,W,3] uint8 or None
    def finish(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/trackers/tensorboard, one more per start; a file beside them says how far they reach."""

    def __init__(self, preset: Preset, run: Path, done: int):
        from accelerate.tracking import TensorBoardTracker

        folder = run / "trackers" / "tensorboard"
        self.known = folder / "next_epoch.txt"
        self.upcoming = min(int(self.known.read_text()) if self.known.exists() else 0, done)
        self.where = f"tensorboard --logdir {folder}"
        # purge_step: events of the files before from that step on count no more, as those of an epoch that runs again
        self.tracker = _start(TensorBoardTracker("tensorboard", str(folder.parent), purge_step=self.upcoming))
        self.tracker.log({"preset": f"```\n{presets.as_toml(preset)}\n```"}, step=self.upcoming)

    def log(self, epoch: int, values: Mapping[str, float], image: Any) -> None:
        if image is not None:
            self.tracker.log_images({"preview": image[None]}, step=epoch, dataformats="NHWC")
        self.tracker.log(dict(values), step=epoch)  # last: it flushes
        self.known.write_text(str(epoch + 1))

    def finish(self, failed: bool) -> None:
        self.tracker.finish()


class WeightsAndBiases:
    """One W&B run per run folder, its id in RUN/trackers/wandb_id.txt, its files in RUN/trackers/wandb.

    Online the server says how far it knows the run. Offline every start tells the whole run: `wandb sync` of a later
    folder with the same id replaces what an earlier one uploaded.
    """

    def __init__(self, preset: Preset, run: Path, done: int):
        from accelerate.tracking import WandBTracker

        folder = run / "trackers"
        folder.mkdir(exist_ok=True)
        file = folder / "wandb_id.txt"
        if not file.exists():
            file.write_text(secrets.token_hex(8))
        # what the user's environment says wins; without an end to waiting a lost network would hold up the end of the run
        for name, value in {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_FINISH_TIMEOUT": "120"}.items():
            os.environ.setdefault(name, value)
        self.tracker = _start(
            WandBTracker(
                os.environ.get("WANDB_PROJECT", "tdpo"), name=run.resolve().name, id=file.read_text().strip(), resume="allow", dir=str(folder)
            )
        )
        self.tracker.store_init_configuration(preset.as_dict())
        self.upcoming = min(self.tracker.run.step, done)
        self.where = self.tracker.run.url or f"offline; upload it with: wandb sync {Path(self.tracker.run.dir).parent}"

    def log(self, epoch: int, values: Mapping[str, float], image: Any) -> None:
        if image is not None:
            self.tracker.log_images({"preview": [image]}, step=epoch)
        # a step that is not committed is kept back until the next one
        self.tracker.log(dict(values), step=epoch, commit=True)

    def finish(self, failed: bool) -> None:
        self.tracker.run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def _start(tracker: Any) -> Any:
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's logging asks for it; it stays as it is where several processes made it
    getattr(tracker, "start", lambda: None)()  # older versions start in the constructor
    return tracker
