"""`tdpo cross-eval`: what every checkpoint gained, and what it lost, judged by several rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.cli.workers import Workers
from tdpo_cli.console import Console
from tdpo_cli.machine import launch


def cross_eval(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="RUN|CHECKPOINT...", help="Run folders (all their checkpoints), checkpoints, LoRA files, models, `base`.")
    ],
    rewards: Annotated[
        str, typer.Option(metavar="all|A,B,...", help="all: the runs' own, and the learned ones that --zoo or --checkpoint give.")
    ] = "all",
    prompts: Annotated[Optional[str], typer.Option(metavar="FILE", help="Prompts (default: the runs' rollout.eval_prompts, held out).")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, max=99, help="Images per prompt; diversity and agreement need two.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, which all models share, and of the bootstrap.")] = 0,
    out: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="One that was interrupted is continued (default: a new cross-evals/NAME-0001).")
    ] = None,
    epoch: Annotated[Optional[list[int]], typer.Option(help="Of run folders: only this checkpoint; may be repeated (default: all).")] = None,
    preset: Annotated[Optional[str], typer.Option(metavar="NAME|FILE.toml", help="Base model, sampling settings (default: the runs' own).")] = None,
    set_: options.SetOption = None,
    checkpoint: options.CheckpointOption = None,
    zoo: options.ZooOption = None,
    trust_rewards: options.TrustOption = False,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images per network call (default: 16, or less from memory).")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")] = None,
    gpus: options.GpusOption = None,
    processes: options.ProcessesOption = None,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Compare checkpoints with their base model: same held-out prompts, same noise, several rewards."""
    from tdpo_cli.cross_eval.request import CrossEvalRequest
    from tdpo_cli.storage import claims

    workers = Workers.of(gpus, processes)
    workers.must_share(out)
    with claims.given_or_new(out, Path("cross-evals"), _name(checkpoints[0])) as folder:
        request = CrossEvalRequest(
            models=checkpoints, out=folder, rewards=rewards, prompts=prompts, per_prompt=per_prompt, seed=seed, preset=preset,
            overrides=options.overrides(set_, checkpoint, zoo), epochs=epoch or (), batch_size=batch_size, device=device or workers.device,
            trust_rewards=trust_rewards,
        )  # fmt: skip
        if launch.is_main():
            request.check()
        workers.start(workers.plan.workers, request.out)  # how much there is to do is not known yet
        options.prepare_libraries()
        from tdpo_cli.cross_eval import cross_eval as evaluation

        report = evaluation.run(request, Console(quiet or json_, silent=not launch.is_main()))
    if json_ and launch.is_main():
        print(json.dumps(report))


def _name(argument: str) -> str:
    """Of the first argument, for a new folder: a run's name, RUN-epoch_0009, a file without its suffix."""
    path = Path(argument)
    if path.resolve().parent.name == "checkpoints":
        return f"{path.resolve().parent.parent.name}-{path.name}"
    return path.resolve().name.removesuffix(".safetensors") or "base"
