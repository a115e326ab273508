"""`tdpo train`: resolve the preset, start the workers or be one, train; or only say what would happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.cli.workers import Workers
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import launch


def train(
    preset: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Name or file of the preset (default: quickstart).",
            autocompletion=options.complete_presets,
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    set_: options.SetOption = None,
    algorithm: Annotated[
        Optional[str], typer.Option(metavar="ddpo|grpo|tdpo|tdpo-r", help="Same as --set algorithm.name=...", rich_help_panel=options.MODEL)
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Same as --set run.seed=...", rich_help_panel=options.RUN)] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Same as --set run.epochs=...", rich_help_panel=options.RUN)] = None,
    stop_on_overoptimisation: Annotated[
        Optional[int],
        typer.Option(
            metavar="EPOCHS", help="Stop once the verdict was `over-optimising` for this many epochs in a row.", rich_help_panel=options.RUN
        ),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="The run folder (default: runs/PRESET-0001 or the next free number).", rich_help_panel=options.RUN)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=options.RUN)] = False,
    tracker: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="Also log to tensorboard or wandb; may be repeated.", rich_help_panel=options.RUN),
    ] = None,
    gpus: options.GpusOption = None,
    processes: options.ProcessesOption = None,
    checkpoint: options.CheckpointOption = None,
    zoo: options.ZooOption = None,
    trust_rewards: options.TrustOption = False,
    memory_limit: Annotated[
        Optional[str],
        typer.Option(
            metavar="SIZE|auto",
            help="Divide the work so that a process needs less than this, such as 12GB. The result stays the same.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    allow_distilled: Annotated[
        bool, typer.Option("--allow-distilled", help="Same as --set model.allow_distilled=true.", rich_help_panel=options.MODEL)
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would happen; write nothing.", rich_help_panel=options.RUN)] = False,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Train a model as a preset describes."""
    # here, because `tdpo --help` needs none of it
    from tdpo_cli.cli import train_request
    from tdpo_cli.models import quantise
    from tdpo_cli.storage import claims
    from tdpo_cli.storage.run_dir import RunDir

    overrides = options.overrides(set_, checkpoint, zoo)
    given = {
        "algorithm.name": algorithm, "run.seed": seed, "run.epochs": epochs, "run.stop_on_overoptimisation": stop_on_overoptimisation,
        "run.trackers": tracker, "run.memory_limit": memory_limit, "model.allow_distilled": allow_distilled or None,
    }  # fmt: skip
    overrides += [(key, value) for key, value in given.items() if value is not None]
    resume = resume or launch.restarted()
    if resume and out is None:
        raise RequestError("--resume needs --out RUN: the folder of the run to continue.")
    resolved, resume = train_request.resolve(preset, overrides, out, resume, trust_rewards, quiet=json_)
    if dry_run:
        return train_request.dry_run(resolved, json_)
    workers = Workers.of(gpus, processes)
    quantise.check(resolved.model.quantise, workers.device)
    with claims.given_or_new(out, Path("runs"), Path(preset or "quickstart").stem, take=launch.is_main()) as folder:
        if launch.is_main() and not resume:
            RunDir(folder).must_be_free()
        workers.start(resolved.rollout.samples_per_epoch, folder, any_launcher=True)
        console = Console(quiet or json_, silent=not launch.is_main())
        with console.working("loading libraries"):
            options.prepare_libraries()
            from tdpo_cli.train import train as training

        report = training.run(resolved, folder, resume, console, workers.device)
    if json_ and launch.is_main():
        print(json.dumps(report))
