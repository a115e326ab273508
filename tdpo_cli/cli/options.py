"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tdpo_cli.errors import RequestError

# groups of options in --help
MODEL, RUN, MACHINE, OUTPUT = "What to use", "The run", "Machine", "Output"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.", rich_help_panel=OUTPUT)]
SetOption = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated.", rich_help_panel=MODEL)
]
CheckpointOption = Annotated[
    Optional[list[str]],
    typer.Option("--checkpoint", metavar="REWARD=PATH", help="Where a reward's checkpoint is; may be repeated.", rich_help_panel=MODEL),
]
GpusOption = Annotated[
    Optional[int], typer.Option(min=1, metavar="N", help="Start one worker on each of N GPUs. The result stays the same.", rich_help_panel=MACHINE)
]
ProcessesOption = Annotated[
    Optional[int], typer.Option(min=1, metavar="N", help="Start N workers on the CPU. The result stays the same.", rich_help_panel=MACHINE)
]
TrustOption = Annotated[
    bool, typer.Option("--trust-rewards", help="Allow Python code and servers that a run's own preset.json names.", rich_help_panel=MODEL)
]
ZooOption = Annotated[
    Optional[str], typer.Option("--zoo", metavar="sandbox", help="Take reward checkpoints from the embedded set.", rich_help_panel=MODEL)
]


def complete_presets(incomplete: str) -> list[str]:
    """Names of the shipped presets, for the shell's completion."""
    from tdpo_cli.config import preset as presets

    return [name for name in presets.names() if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Run folders below runs/, for the shell's completion."""
    return [str(file.parent) for file in sorted(Path("runs").glob("*/preset.json")) if str(file.parent).startswith(incomplete)]


def complete_rewards(incomplete: str) -> list[str]:
    """The rewards that need no name of a file, the last of a list with commas, for the shell's completion."""
    from tdpo_cli import rewards

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in ("all", *rewards.names()) if name.startswith(last)]


def overrides(set_: list[str] | None, checkpoint: list[str] | None, zoo: str | None) -> list[tuple[str, Any]]:
    """What --set, --checkpoint and --zoo say, as ("section.key", value). Raises RequestError."""
    from tdpo_cli.config import preset as presets

    overrides = [presets.parse_override(text) for text in set_ or []]
    overrides += [(f"reward.checkpoints.{name}", path) for name, path in checkpoints(checkpoint).items()]
    if zoo is not None:
        overrides.append(("reward.zoo", zoo))
    return overrides


def checkpoints(given: list[str] | None) -> dict[str, str]:
    """REWARD=PATH, each -> reward name -> path. Raises RequestError."""
    paths = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise RequestError(f"--checkpoint {text}: expected REWARD=PATH.")
        paths[name] = path
    return paths


def prepare_libraries() -> None:
    """Before torch and its friends are imported: waiting threads sleep, and only errors reach the screen."""
    # threads that spin while they wait make tiny models 30x slower on a busy machine; must be set before torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import logging
    import warnings

    for library in ("transformers", "diffusers", "bitsandbytes", "peft", "torch.utils._pytree"):  # the last warns when torchao is imported
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
