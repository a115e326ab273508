"""`tdpo doctor`: whether this machine can run a preset."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console


def doctor(
    preset: Annotated[Optional[str], typer.Option(metavar="NAME|FILE.toml", help="Whether this could run here (default: quickstart).")] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the preset's missing files first.")] = False,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Show what this machine can run and which files are missing; the exit status is 1 if the preset cannot run yet."""
    from tdpo_cli.config import preset as presets

    presets.load(preset or "quickstart")  # a wrong name is answered at once
    options.prepare_libraries()
    from tdpo_cli import doctor as examination

    report = examination.run(preset, Console(quiet or json_), fetch)
    if json_:
        print(json.dumps(report))
    if not report["ok"]:
        raise typer.Exit(1)
