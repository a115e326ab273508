"""The runs below a folder, one row each: what they trained, how far they came, what the verdict is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tdpo_cli.console import size
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report.numbers import finite
from tdpo_cli.storage.run_dir import RunDir

HEADS = ("run", "method", "reward", "done", "rise", "verdict", "size", "changed")


def as_text(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """One line per run under a heading; 80 columns where names are short. `rise`: of the trained reward, in sd of epoch 0."""
    if not rows:
        return f"{folder}: no runs there. `tdpo train` makes one."
    lines = [HEADS, *(_line(row, folder) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(" ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def find(folder: Path) -> list[dict[str, Any]]:
    """One row per run folder at or below `folder`, in the order of their names; a damaged run has an `error`."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder.")
    return [_row(path) for path in sorted(_run_folders(folder))]


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders that hold a preset.json. What lies inside a run is not searched, and links are not followed."""
    for place, inside, files in os.walk(folder):
        if "preset.json" in files:
            inside.clear()
            yield Path(place)
        inside[:] = [name for name in inside if not name.startswith(".")]


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(folder), "bytes": _bytes(folder), "changed": None, "error": None}
    try:
        run = RunDir(folder)
        preset = run.read_preset()
        metrics = [{key: finite(value) for key, value in epoch.items()} for epoch in run.read_metrics()]
        file = folder / "metrics.jsonl"
        changed = (file if file.exists() else folder / "preset.json").stat().st_mtime
        return row | {
            "base": preset.model.base,
            "algorithm": preset.algorithm.name,
            "reward": preset.trained_words,
            "seed": preset.run.seed,
            "epochs": len(metrics),
            "epochs_planned": preset.run.epochs,
            "rise": verdict.rise(metrics, preset.trained) if metrics else None,
            "verdict": verdict.read(metrics, preset).as_dict(),
            "changed": datetime.fromtimestamp(changed).astimezone().isoformat(timespec="seconds"),
        }
    except (RequestError, WorkError, OSError, KeyError) as error:
        return row | {"error": str(error)}


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _line(row: dict[str, Any], folder: Path) -> tuple[str, ...]:
    path = Path(row["run"])
    name = str(path.relative_to(folder)) if path != folder else str(path)
    if row["error"] is not None:
        return name, "-", "-", "-", "-", "damaged", size(row["bytes"]), "-"
    rise = "-" if row["rise"] is None else f"{row['rise']:+.2f}"
    epochs = f"{row['epochs']}/{row['epochs_planned']}"
    when = datetime.fromisoformat(row["changed"]).strftime("%m-%d %H:%M")
    return name, row["algorithm"], row["reward"], epochs, rise, row["verdict"]["kind"], size(row["bytes"]), when
