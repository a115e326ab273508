"""`tdpo score`: what reward models think of the images of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console
from tdpo_cli.errors import WorkError


def score(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Its images, also those in folders below.")],
    rewards: Annotated[
        str, typer.Option(metavar="all|A,B,...", help="all: aesthetic, pickscore, hpsv2, imagereward.", autocompletion=options.complete_rewards)
    ] = "all",
    prompts: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Prompts: .txt, one line per image in name order; .jsonl or .csv.")] = None,
    prompt: Annotated[Optional[str], typer.Option(metavar="TEXT", help="One prompt for all images.")] = None,
    variant: Annotated[str, typer.Option(metavar="tdpo|package", help="As the official TDPO, or as each reward's own package.")] = "tdpo",
    checkpoint: options.CheckpointOption = None,
    zoo: options.ZooOption = None,
    out: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="A .jsonl or .csv; one that exists is continued (default: a new scores/FOLDER-0001.jsonl).")
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images per network call (default: 8, on a GPU 64).")] = None,
    processes: Annotated[Optional[int], typer.Option(min=1, help="Share the work among CPU processes (or --device).")] = None,
    gpus: Annotated[Optional[int], typer.Option(min=1, help="Share the work among GPUs.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")] = None,
    dtype: Annotated[str, typer.Option(metavar="fp32|fp16|bf16", help="Other than fp32: prints how far scores are from it.")] = "fp32",
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Also what lies outside FOLDER: links, names in metadata.jsonl.")] = False,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Score the images of a folder with reward models."""
    from tdpo_cli.score.request import ScoreRequest

    request = ScoreRequest(
        folder=folder, rewards=rewards, prompt=prompt, prompts=prompts, variant=variant, checkpoints=options.checkpoints(checkpoint), zoo=zoo,
        out=out, batch_size=batch_size, processes=processes, gpus=gpus, device=device, dtype=dtype,
        follow_links=follow_links,
    )  # fmt: skip
    request.check()
    options.prepare_libraries()
    from tdpo_cli.score import score as scoring

    report = scoring.run(request, Console(quiet or json_))
    if json_:
        print(json.dumps(report))
    if failure := scoring.failure(report):
        raise WorkError(failure)
