"""Checkpoint + prompts -> images, metadata.jsonl and a labelled grid."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tdpo_cli import checkpoints, grid, memory, models, world
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError
from tdpo_cli.randomness import Randomness
from tdpo_cli.rollout import generate
from tdpo_cli.run_dir import next_free

GRID_IMAGES = 64  # a grid holds at most this many
GRID_COLUMNS = 8


def run(
    checkpoint: str,
    wanted: Sequence[str],
    preset: str | None,
    overrides: Sequence[tuple[str, Any]],
    epoch: int | None,
    out: Path | None,
    per_prompt: int,
    seed: int,
    batch_size: int | None,
    eta: float | None,
    lora_scale: float,
    device: str | None,
    console: Console,
) -> dict[str, Any]:
    """Write `per_prompt` images of every prompt into `out`. -> a summary for --json. Raises RequestError."""
    source = checkpoints.find(checkpoint, preset, overrides, epoch)
    settings = source.preset.rollout
    out = out or next_free(Path("samples"), source.name)
    if (out / "metadata.jsonl").exists():
        raise RequestError(f"{out} already holds samples; choose another --out.")
    place = world.device(device)
    policy = models.load(
        source.preset.model, device=place, trainable=False, negative_prompt=settings.negative_prompt, lora_scale=lora_scale
    )
    policy.set_schedule(settings.steps, settings.eta if eta is None else eta)
    too_long = policy.longer_than_limit(wanted)
    if too_long:
        console.warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")

    texts = [prompt for prompt in wanted for _ in range(per_prompt)]
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else None
    batch_size = batch_size or memory.micro_batch(source.preset, free)
    try:
        out.mkdir(parents=True, exist_ok=True)
        images = _write(policy, texts, per_prompt, seed, settings.guidance_scale, settings.steps, batch_size, out, console)
    except OSError as error:
        raise RequestError(f"{out}: cannot be written: {error.strerror or error}") from None
    columns = per_prompt if 1 < per_prompt <= GRID_COLUMNS else min(len(images), GRID_COLUMNS)
    grid.draw(images, texts[: len(images)], columns, title=f"{source.name}, seed {seed}").save(out / "grid.png")
    console.say(f"{len(texts)} images of {len(wanted)} prompts in {out} (grid.png shows {len(images)})")
    return {"out": str(out), "images": len(texts), "grid": str(out / "grid.png"), "source": source.name}


def _write(
    policy: models.Policy, texts: Sequence[str], per_prompt: int, seed: int, guidance: float, steps: int,
    batch_size: int, out: Path, console: Console,
) -> list[Image.Image]:  # fmt: skip
    """Images as they come, each with its line of metadata.jsonl. -> those for the grid"""
    first: list[Image.Image] = []
    digits = max(4, len(str(len(texts) - 1)))
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as metadata, console.progress("sampling", len(texts) * steps) as advance:
        batches = generate(policy, texts, range(len(texts)), Randomness(seed, "sample"), guidance, batch_size, advance)
        for number, tensor in enumerate(image for batch in batches for image in batch):
            image, text = grid.to_pil(tensor), texts[number]
            name = f"{number:0{digits}d}-{_slug(text)}.png"
            image.save(out / name)
            line = {"file_name": name, "text": text, "seed": seed, "sample": number, "image_of_prompt": number % per_prompt}
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
            if number < GRID_IMAGES:
                first.append(image)
    return first


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"
