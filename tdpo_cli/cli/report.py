"""`tdpo report`: a run folder as one web page, or several compared on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="A run folder, also of a run that is still going; several are compared.", autocompletion=options.complete_runs
        ),
    ],
    out: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Where to write the page (default: RUN/report.html; of several: comparison.html).")
    ] = None,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Write a run's curves, pictures and verdict as one self-contained HTML page, or compare several runs on one."""
    from tdpo_cli.report import report as reporting

    console = Console(quiet or json_)
    summary = reporting.run(runs[0], out, console) if len(runs) == 1 else reporting.compare(runs, out, console)
    if json_:
        print(json.dumps(summary))
