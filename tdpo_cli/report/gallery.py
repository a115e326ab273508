"""Base and checkpoint side by side: the same prompt and noise, every pair chosen with two plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo_cli.report import pictures
from tdpo_cli.report.numbers import change, finite, known, short, spread

THUMBNAIL = 256  # px, where images are too large to be embedded as they are
FEW_PROMPTS, FEW_IMAGES = 8, 2  # what is kept of prompts and of images per prompt before checkpoints are left out


@dataclass(frozen=True)
class Shown:
    """What of a cross-evaluation is on the page: places in its lists."""

    models: Sequence[int]
    prompts: Sequence[int]
    images: Sequence[int]
    thumbnails: bool


def gallery(result: Mapping[str, Any], folder: Path, budget: int = pictures.BUDGET) -> dict[str, Any] | None:
    """What gallery.html needs; None if no image is there."""
    models, shown = result["models"], choose(result, folder, budget)
    compared = [m for m in shown.models if models[m]["base"] is not None]
    if not compared:
        return None
    place = {models[m]["name"]: i for i, m in enumerate(shown.models)}
    content = {
        "images": [[[_uri(_file(folder, models[m], p, i), shown.thumbnails) for i in shown.images] for p in shown.prompts] for m in shown.models],
        "prompts": [result["prompts"][p] for p in shown.prompts],
        "models": [models[m]["name"] for m in shown.models],
        "bases": [place.get(models[m]["base"], place[models[m]["name"]]) for m in shown.models],
        "scores": [[_scores(result, m, p) for p in shown.prompts] for m in shown.models],
    }
    first = place[models[compared[-1]]["name"]]
    return {
        "content": content, "first": first, "compared": [place[models[m]["name"]] for m in compared], "pixels": not shown.thumbnails,
        "rows": [[name, *content["scores"][first][0][i]] for i, name in enumerate(result["rewards"])], "left_out": _left_out(result, shown),
    }  # fmt: skip


def choose(result: Mapping[str, Any], folder: Path, budget: int) -> Shown:
    """What fits into `budget` bytes: all, or smaller images, then fewer per prompt, fewer prompts, fewer checkpoints; the last ones always stay."""
    models, per_prompt = result["models"], result["per_prompt"]
    everything = Shown(range(len(models)), range(len(result["prompts"])), range(per_prompt), False)
    sample = [picture for m in models for p in (0, len(result["prompts"]) - 1) if (picture := pictures.read(_file(folder, m, p, 0)))]
    if not sample:
        return Shown([], [], [], False)
    count = len(models) * len(result["prompts"]) * per_prompt
    if count * _mean_size(sample) <= budget:
        return everything
    thumbnails = max(picture.width for picture in sample) > THUMBNAIL
    if thumbnails:
        sample = [pictures.as_jpeg(picture, THUMBNAIL) for picture in sample[:12]]
    m, p, k = fitting(len(models), len(result["prompts"]), per_prompt, int(budget / (1.1 * _mean_size(sample))))
    lasts = {i for i, one in enumerate(models) if one["base"] is None or i + 1 == len(models) or models[i + 1]["run"] != one["run"]}
    others = [i for i in range(len(models)) if i not in lasts]
    kept = sorted(lasts | set(spread(others, max(0, m - len(lasts)))))
    return Shown(kept, spread(everything.prompts, p), range(k), thumbnails)


def fitting(models: int, prompts: int, per_prompt: int, room: int) -> tuple[int, int, int]:
    """(models, prompts, images per prompt) with at most `room` images in all, as far as the smallest page allows."""
    k = max(min(per_prompt, FEW_IMAGES), min(per_prompt, room // (models * prompts)))
    p = max(min(prompts, FEW_PROMPTS), min(prompts, room // (models * k)))
    m = max(min(models, 2), min(models, room // (p * k)))
    return m, max(1, min(p, room // (m * k))), k


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
    totals = ((shown.models, len(result["models"]), "models"), (shown.prompts, len(result["prompts"]), "prompts"),
              (shown.images, result["per_prompt"], "images per prompt"))  # fmt: skip
    parts = [f"{len(kept)} of {total} {what}" for kept, total, what in totals if len(kept) < total]
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
