"""Base and checkpoint side by side: the same prompt and noise, every pair chosen with two plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo_cli.report import pictures
from tdpo_cli.report.numbers import change, finite, known, short, spread

THUMBNAIL = 256  # px, where images are too large to be embedded as they are


@dataclass(frozen=True)
class Shown:
    """What of a cross-evaluation is on the page, of every model: places of prompts, images per prompt."""

    prompts: Sequence[int]
    per_prompt: int
    thumbnails: bool


def gallery(result: Mapping[str, Any], folder: Path, budget: int = pictures.BUDGET) -> dict[str, Any] | None:
    """What gallery.html needs; None if no image is there."""
    models, shown = result["models"], choose(result, folder, budget)
    compared = [m for m, model in enumerate(models) if model["base"] is not None]
    if not compared or shown is None:
        return None
    place = {model["name"]: m for m, model in enumerate(models)}
    uris = lambda model, p: [_uri(_file(folder, model, p, i), shown.thumbnails) for i in range(shown.per_prompt)]
    content = {
        "images": [[uris(model, p) for p in shown.prompts] for model in models],
        "prompts": [result["prompts"][p] for p in shown.prompts],
        "models": list(place),
        "bases": [place.get(model["base"], m) for m, model in enumerate(models)],
        "scores": [[_scores(result, m, p) for p in shown.prompts] for m in range(len(models))],
    }
    rows = [[name, *cells] for name, cells in zip(result["rewards"], content["scores"][compared[-1]][0], strict=True)]
    return {"content": content, "compared": compared, "pixels": not shown.thumbnails, "rows": rows, "left_out": _left_out(result, shown)}


def choose(result: Mapping[str, Any], folder: Path, budget: int) -> Shown | None:
    """What fits into `budget` bytes: all, or smaller images, then fewer per prompt, then fewer prompts. None if there are no images."""
    models, prompts, per_prompt = result["models"], len(result["prompts"]), result["per_prompt"]
    sample = [picture for m in models for p in (0, prompts - 1) if (picture := pictures.read(_file(folder, m, p, 0)))]
    if not sample:
        return None
    if len(models) * prompts * per_prompt * _mean_size(sample) <= budget:
        return Shown(range(prompts), per_prompt, False)
    thumbnails = max(picture.width for picture in sample) > THUMBNAIL
    if thumbnails:
        sample = [pictures.as_jpeg(picture, THUMBNAIL) for picture in sample[:12]]
    room = int(budget / (1.1 * _mean_size(sample))) // len(models)  # images of each model
    few = max(1, min(per_prompt, room // prompts))
    return Shown(spread(range(prompts), max(1, room // few)), few, thumbnails)


def _scores(result: Mapping[str, Any], m: int, p: int) -> list[list[str]]:
    """By reward: mean of the prompt's images under the base, under the model, and their difference."""
    model, rows = result["models"][m], []
    base = next((one for one in result["models"] if one["name"] == model["base"]), model)
    for name in result["rewards"]:
        pair = [_mean(one["scores"].get(name), p) for one in (base, model)]
        rows.append([short(pair[0]), short(pair[1]), change(None if None in pair else pair[1] - pair[0])])
    return rows


def _mean(scores: Sequence[Sequence[float | None]] | None, p: int) -> float | None:
    values = known(map(finite, scores[p])) if scores else []
    return sum(values) / len(values) if values else None


def _left_out(result: Mapping[str, Any], shown: Shown) -> str:
    totals = ((len(shown.prompts), len(result["prompts"]), "prompts"), (shown.per_prompt, result["per_prompt"], "images per prompt"))
    parts = [f"{kept} of {total} {what}" for kept, total, what in totals if kept < total]
    if shown.thumbnails:
        parts.append(f"images as JPEG of at most {THUMBNAIL} px")
    return f"To keep this file small it holds {', '.join(parts)}. All are in images/." if parts else ""


def _file(folder: Path, model: Mapping[str, Any], prompt: int, image: int) -> Path:
    return folder / model["images"] / f"{prompt:04d}-{image:02d}.png"


def _uri(file: Path, thumbnail: bool) -> str:
    picture = pictures.read(file)
    if picture is None:
        return ""
    return (pictures.as_jpeg(picture, THUMBNAIL) if thumbnail else picture).uri


def _mean_size(sample: Sequence[pictures.Picture]) -> float:
    return sum(len(picture.content) for picture in sample) / len(sample)
