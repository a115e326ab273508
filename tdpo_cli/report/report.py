"""A run's report.html: read the run folder, judge it, draw the page, write it whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdpo_cli.console import Console, size
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import html
from tdpo_cli.report import run_page as page
from tdpo_cli.report.numbers import finite
from tdpo_cli.storage.run_dir import RunDir


def run(folder: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Write the page, and say where it is and what it says. -> a summary for --json. Raises RequestError, WorkError."""
    report = write(folder, out)
    console.say(f"{report['report']}: {size(report['bytes'])}, {report['epochs']} of {report['epochs_planned']} epochs")
    console.say(f"verdict: {report['verdict']['sentence']}")
    return report


def write(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """Write the report of a run, finished or not, to `file` or to report.html in its folder. -> a summary for --json.

    Raises RequestError if there is no run or the file cannot be written, WorkError if the run's metrics are damaged or the disk fails.
    """
    run = RunDir(folder)
    preset = run.read_preset()
    rows = [{key: finite(value) for key, value in row.items()} for row in run.read_metrics(preset.rewards)]
    judged = verdict.read(rows, preset)
    file = file or folder / "report.html"
    html.save(page.render(folder, rows, judged, {name: verdict.rise(rows, name) for name in preset.rewards}), file)
    return {
        "run": str(folder), "report": str(file), "bytes": file.stat().st_size, "epochs": len(rows), "epochs_planned": preset.run.epochs,
        "verdict": judged.as_dict(),
    }  # fmt: skip


def write_or_warn(folder: Path, warn: Callable[[str], None]) -> None:
    """At the end of a run: a page that cannot be written does not fail the training that it shows."""
    try:
        write(folder)
    except (RequestError, WorkError, OSError) as error:
        warn(f"no report.html: {error} `tdpo report {folder}` writes it later.")
