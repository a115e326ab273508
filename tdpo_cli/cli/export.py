"""`tdpo export`: a checkpoint's LoRA for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a run folder or LoRA weights.")],
    format_: Annotated[str, typer.Option("--format", metavar="kohya", help="kohya: for ComfyUI, A1111 and their kin.")],
    out: Annotated[Optional[Path], typer.Option(help="The file (default: NAME-kohya.safetensors, here).")] = None,
    epoch: Annotated[Optional[int], typer.Option(help="Of a run folder: which checkpoint (default: the last).")] = None,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Write a checkpoint's LoRA in another program's format."""
    from tdpo_cli.export.request import ExportRequest

    request = ExportRequest(checkpoint, format_, out, epoch)
    request.check()
    options.prepare_libraries()
    from tdpo_cli.export import export as exporting

    report = exporting.run(request, Console(quiet or json_))
    if json_:
        print(json.dumps(report))
