"""Checkpoint + prompts -> images, metadata.jsonl and a labelled grid."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tdpo_cli import models
from tdpo_cli.console import Console
from tdpo_cli.errors import WorkError
from tdpo_cli.machine import memory, world
from tdpo_cli.models.checkpoints import Source
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.sampling import grid
from tdpo_cli.sampling.generate import generate
from tdpo_cli.sampling.request import SampleRequest
from tdpo_cli.storage import disk, outside

GRID_IMAGES = 64  # a grid holds at most this many
GRID_COLUMNS = 8


def run(request: SampleRequest, console: Console) -> dict[str, Any]:
    """Write the images, each process its share. -> a summary for --json. Raises RequestError, WorkError."""
    request.check()
    source = request.source()
    how, out = source.preset.shown, request.out
    team = world.current(str(world.device(request.device)))
    policy = _policy(request, source, team.device, console)

    texts = [prompt for prompt in request.prompts for _ in range(request.per_prompt)]
    digits = max(4, len(str(len(texts) - 1)))
    names = [f"{number:0{digits}d}-{_slug(text)}.png" for number, text in enumerate(texts)]
    free = torch.cuda.mem_get_info(team.device)[0] if team.device.type == "cuda" else None
    batch_size = request.batch_size or memory.sample_batch(source.preset, free)
    decode_chunk = memory.DECODED if team.device.type == "cuda" else None
    mine = team.mine(len(texts))
    owned = disk.lock(out, "sampling") if team.is_main else None  # held to the end
    request.check()  # once more: another process may have finished in this folder meanwhile
    team.barrier()
    owned = owned or disk.watch(out)
    with console.progress("sampling", len(mine) * how.steps) as advance:
        own = [texts[i] for i in mine]
        batches = generate(policy, own, mine, Randomness(request.seed, "sample"), how.guidance_scale, batch_size, advance, decode_chunk)
        for number, image in zip(mine, (image for batch in batches for image in batch), strict=True):
            disk.still_there(out, owned)
            with disk.whole(out / names[number], inside=out) as aside:
                grid.to_pil(image).save(aside, format="PNG")
    team.close()
    if team.is_main:
        disk.still_there(out, owned)
        if gone := [name for name in names if not (out / name).exists()]:
            raise WorkError(f"{out}: {len(gone)} images were removed meanwhile, {gone[0]} among them; the same command makes them anew.")
        _write_grid(out, names, texts, request.per_prompt, title=f"{source.name}, seed {request.seed}")
        _write_list(out, names, texts, request.seed, request.per_prompt)
    owned.close()
    console.say(f"{len(texts)} images of {len(request.prompts)} prompts in {out} (grid.png shows {min(len(texts), GRID_IMAGES)})")
    return {"out": str(out), "images": len(texts), "grid": str(out / "grid.png"), "source": source.name}


def _policy(request: SampleRequest, source: Source, device: torch.device, console: Console) -> Policy:
    options = {"negative_prompt": source.preset.rollout.negative_prompt, "lora_scale": request.lora_scale}
    policy = models.load(source.preset.model, device=device, trainable=False, **options)
    too_long = policy.longer_than_limit(request.prompts)
    if too_long:
        console.warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")
    return policy.scheduled(source.preset.shown.steps, source.preset.shown.noise)


def _write_list(out: Path, names: Sequence[str], texts: Sequence[str], seed: int, per_prompt: int) -> None:
    """metadata.jsonl, the imagefolder convention; written last, so that it names only images that are there."""
    lines = []
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        line = {"file_name": name, "text": text, "seed": seed, "sample": number, "image_of_prompt": number % per_prompt}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    disk.write_text(out / "metadata.jsonl", "".join(lines), inside=out)


def _write_grid(out: Path, names: Sequence[str], texts: Sequence[str], per_prompt: int, title: str) -> None:
    with contextlib.ExitStack() as stack, disk.failures(out):
        images = [outside.open_image(stack.enter_context(outside.open_regular(out / name))) for name in names[:GRID_IMAGES]]
        columns = per_prompt if 1 < per_prompt <= GRID_COLUMNS else min(len(images), GRID_COLUMNS)
        drawn = grid.draw(images, texts[: len(images)], columns, title=title)
    with disk.whole(out / "grid.png", inside=out) as aside:
        drawn.save(aside, format="PNG")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"
