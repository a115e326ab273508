"""The strip of preview images: before training, and one image per epoch under a slider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tdpo_cli.report import pictures

SMALL = 700  # px; images up to this width stand side by side


def strip(folder: Path) -> dict[str, Any] | None:
    """What strip.html needs of a run folder; None if no image is there."""
    files = [file for file in (folder / "images").glob("*.png") if file.stem == "before" or _epoch_of(file) is not None]
    files.sort(key=lambda file: -1 if file.stem == "before" else _epoch_of(file))
    shown = pictures.fit(files)
    if not shown.pictures:
        return None
    labels = ["before training" if files[i].stem == "before" else f"epoch {_epoch_of(files[i])}" for i in shown.places]
    end = len(labels) - 1
    return {
        "first": (labels[0], shown.pictures[0]), "last": (labels[-1], shown.pictures[-1]), "small": shown.pictures[-1].width <= SMALL,
        # the page itself shows the first and the last; its script finds the others here
        "frames": [[label, None if i in (0, end) else shown.pictures[i].uri] for i, label in enumerate(labels)], "left_out": shown.left_out,
    }  # fmt: skip


def _epoch_of(file: Path) -> int | None:
    number = file.stem.removeprefix("epoch_")
    return int(number) if number.isascii() and number.isdigit() and number != file.stem else None
