"""The report of a run, for whoever asks on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tdpo_cli import run_page
from tdpo_cli.console import Console, size


def run(folder: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Write the page, and say where it is and what it says. -> a summary for --json. Raises RequestError, WorkError."""
    report = run_page.write(folder, out)
    console.say(f"{report['report']}: {size(report['bytes'])}, {report['epochs']} of {report['epochs_planned']} epochs")
    console.say(f"verdict: {report['verdict']['sentence']}")
    return report
