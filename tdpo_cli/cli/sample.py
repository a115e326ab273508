"""`tdpo sample`: images from a checkpoint."""

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


def sample(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a run folder, LoRA weights, `base`, a diffusers folder or hub id.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPTS...", help="Strings, a text file with one prompt a line, or - for standard input.")],
    preset: Annotated[
        Optional[str], typer.Option(metavar="NAME|FILE.toml", help="Base model and sampling settings (default: the run's own).")
    ] = None,
    set_: options.SetOption = None,
    epoch: Annotated[Optional[int], typer.Option(help="Of a run folder: which checkpoint (default: the last).")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the images (default: a new samples/NAME-0001).")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images, whatever the batch size.")] = 0,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images per network call (default: from memory).")] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, max=1000, help="Denoising steps (default: the preset's).")] = None,
    guidance_scale: Annotated[Optional[float], typer.Option(min=0, help="(default: the preset's)")] = None,
    noise: Annotated[
        Optional[float], typer.Option("--noise", "--eta", min=0, help="eta (DDIM) or noise level (flow), 0 is deterministic (default: the preset's).")
    ] = None,
    negative_prompt: Annotated[Optional[str], typer.Option(help="(default: the preset's)")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA; 0 is the base model.")] = 1.0,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")] = None,
    dtype: Annotated[Optional[str], typer.Option(metavar="fp32|fp16|bf16", help="(default: the preset's)")] = None,
    gpus: options.GpusOption = None,
    processes: options.ProcessesOption = None,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Sample images from a checkpoint."""
    from tdpo_cli.config import preset as presets
    from tdpo_cli.config import prompts as prompt_sources
    from tdpo_cli.sampling.request import SampleRequest

    workers = Workers.of(gpus, processes)
    if workers.several and "-" in prompts:
        raise RequestError("prompts from standard input reach one process only: give a text file with --gpus or --processes.")
    overrides = [presets.parse_override(text) for text in set_ or []]
    given = {
        "sampling.steps": steps, "sampling.guidance_scale": guidance_scale, "sampling.noise": noise,
        "rollout.negative_prompt": negative_prompt, "model.dtype": dtype,
    }  # fmt: skip
    overrides += [(key, value) for key, value in given.items() if value is not None]
    request = SampleRequest(
        checkpoint=checkpoint, prompts=prompt_sources.from_arguments(prompts), preset=preset, overrides=overrides, epoch=epoch, out=out,
        per_prompt=per_prompt, seed=seed, batch_size=batch_size, lora_scale=lora_scale, device=device or workers.device,
    )  # fmt: skip
    if launch.is_main():
        request.check()
    workers.must_share(out)
    with request.in_a_folder() as request:
        workers.start(request.images, request.out)
        options.prepare_libraries()
        from tdpo_cli.sampling import sample as sampling

        report = sampling.run(request, Console(quiet or json_, silent=not launch.is_main()))
    if json_ and launch.is_main():
        print(json.dumps(report))
