"""`tdpo report`: a run folder as one web page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, also of a run that is still going.")],
    out: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Where to write the page [default: RUN/report.html].")] = None,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Write a run's curves, pictures and verdict as one self-contained HTML page."""
    from tdpo_cli.report import report as reporting

    summary = reporting.run(run, out, Console(quiet or json_))
    if json_:
        print(json.dumps(summary))
