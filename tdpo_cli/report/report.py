"""A run's report.html: read the run folder, judge it, draw the page, write it whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console, size
from tdpo_cli.errors import RequestError
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import compare_page, html
from tdpo_cli.report import run_page as page
from tdpo_cli.report.numbers import finite
from tdpo_cli.storage.run_dir import RunDir


def run(folder: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Write the page, and say where it is and what it says. -> a summary for --json. Raises RequestError, WorkError."""
    report = write(folder, out)
    _warn_of_damage(folder, console)
    console.say(f"{report['report']}: {size(report['bytes'])}, {report['epochs']} of {report['epochs_planned']} epochs")
    console.say(f"verdict: {report['verdict']['sentence']}")
    return report


def write(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """Write the report of a run, finished or not, to `file` or to report.html in its folder. -> a summary for --json.

    Raises RequestError if there is no run or the file cannot be written, WorkError if the run's metrics are damaged or the disk fails.
    """
    preset, rows = _read(folder)
    judged = verdict.read(rows, preset)
    file = file or folder / "report.html"
    rises = {name: verdict.rise(rows, name) for name in dict.fromkeys((preset.trained, *preset.rewards))}
    html.save(page.render(folder, rows, judged, rises), file)
    return {
        "run": str(folder), "report": str(file), "bytes": file.stat().st_size, "epochs": len(rows), "epochs_planned": preset.run.epochs,
        "verdict": judged.as_dict(),
    }  # fmt: skip


def compare(folders: Sequence[Path], out: Path | None, console: Console) -> dict[str, Any]:
    """Write one page with several runs, and say where it is. -> a summary for --json. Raises RequestError, WorkError."""
    if len(folders) > compare_page.MOST_RUNS:
        raise RequestError(f"{len(folders)} runs: one page compares at most {compare_page.MOST_RUNS}.")
    runs = []
    for folder, name in zip(folders, _short_names(folders), strict=True):
        preset, rows = _read(folder)
        _warn_of_damage(folder, console)
        rises = {reward: verdict.rise(rows, reward) for reward in dict.fromkeys((preset.trained, *preset.rewards))}
        runs.append(compare_page.Run(name, preset, rows, verdict.read(rows, preset).as_dict(), rises))
    file = out or Path("comparison.html")
    html.save(compare_page.render(runs), file)
    console.say(f"{file}: {size(file.stat().st_size)}, {len(runs)} runs")
    for run in runs:
        console.say(f"{run.name}: {run.verdict['sentence']}")
    return {
        "report": str(file),
        "bytes": file.stat().st_size,
        "runs": [{"run": str(folder), "epochs": len(run.rows), "verdict": run.verdict} for folder, run in zip(folders, runs, strict=True)],
    }


def _warn_of_damage(folder: Path, console: Console) -> None:
    """What the page leaves out because it is not there any more."""
    preset, rows = _read(folder)
    for problem in RunDir(folder).missing(rows, previews=preset.run.preview_images > 0):
        console.warn(f"{folder}: {problem}; the page goes without.")


def _read(folder: Path) -> tuple[Preset, list[dict[str, Any]]]:
    """The run's preset and its metrics, without what is not finite."""
    run = RunDir(folder)
    preset = run.read_preset()
    clean = lambda value: [finite(one) for one in value] if isinstance(value, list) else finite(value)
    return preset, [{key: clean(value) for key, value in row.items()} for row in run.read_metrics(preset.rewards)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; whole paths where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def write_or_warn(folder: Path, warn: Callable[[str], None]) -> None:
    """At the end of a run: a page that cannot be written does not fail the training that it shows."""
    try:
        write(folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is finished and saved
        warn(f"no report.html: {error} `tdpo report {folder}` writes it later.")
