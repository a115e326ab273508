"""`tdpo runs`: the runs below a folder, one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tdpo_cli.cli import options


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to look, also below it.")] = Path("runs"),
    json_: options.JsonFlag = False,
) -> None:
    """List the runs below a folder: algorithm, reward, epochs, rise, verdict, size, time."""
    from tdpo_cli.report import runs as listing

    rows = listing.find(folder)
    print(json.dumps(rows) if json_ else listing.as_text(rows, folder))
