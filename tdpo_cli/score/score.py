"""Image folder -> a table of scores: streamed, resumable, the same whoever scores which part."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli import __version__, rewards
from tdpo_cli.console import Console, duration, significant
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import world
from tdpo_cli.score import captions, summary
from tdpo_cli.score.captions import HOW, Item
from tdpo_cli.score.listing import listed
from tdpo_cli.score.request import ScoreRequest
from tdpo_cli.score.score_file import ScoreFile
from tdpo_cli.score.workers import Problem, Team, Work, place_of, team

BATCH_SIZE = {"cpu": 8, "cuda": 64}
SHOWN_PROBLEMS = 20


def run(request: ScoreRequest, console: Console) -> dict[str, Any]:
    """Score the images of a folder. -> a summary for --json. Raises RequestError, WorkError."""
    started = time.perf_counter()
    request.check()
    names, devices = request.names, _devices(request)
    place = place_of(request.folder)
    pictures = captions.collect(request.folder, request.prompt, request.prompts, request.follow_links)
    items = pictures.items
    for note in pictures.notes:
        console.warn(note)
    _check_prompts(items, names, request.folder)
    with ScoreFile.taken(request.out, request.folder.resolve().name, names) as file:
        batch_size = request.batch_size or BATCH_SIZE.get(devices[0].partition(":")[0], 8)
        paths = rewards.checkpoints(request.zoo, request.checkpoints)
        work = Work(request.folder, names, paths, request.variant, request.dtype, devices, batch_size, place)
        done, difference, problems = _fill(file, work, items, console)
        found = summary.summarise(file.read(), names)
    summary.show(found, console)
    seconds = time.perf_counter() - started
    new = len(items) - done
    console.say(f"{len(items):,} images in {file.path}; {new:,} scored now in {duration(seconds)} ({significant(new / seconds)} a second)")
    return {
        "out": str(file.path),
        "meta": str(file.meta_path),
        "images": len(items),
        "continued_from": done,
        "missing_scores": sum(one["missing"] for one in found.values()),
        "problems": [{"image": image, "problem": problem} for image, problem in problems],
        "rewards": found,
        "half_precision_difference": difference,
        "seconds": seconds,
        "images_per_second": new / seconds,
    }


def failure(report: Mapping[str, Any]) -> str | None:
    """What to say at the end where scores are missing."""
    if not report["missing_scores"]:
        return None
    images = list(dict.fromkeys(problem["image"] for problem in report["problems"]))
    which = f" ({listed(images)})" if images else ""
    return f"{report['missing_scores']} scores are missing{which}; everything else is in {report['out']}."


# --- the request --------------------------------------------------------------------------------------------------------
def _check_prompts(items: Sequence[Item], names: Sequence[str], folder: Path) -> None:
    needing = [name for name in names if rewards.needs_prompt(name)]
    missing = captions.without_prompt(items, folder) if needing else []
    if missing:
        free = [name for name in names if name not in needing]
        instead = f", or ask for {','.join(free)} alone" if free else ""
        raise RequestError(
            f"{', '.join(needing)} need a prompt for every image, and {len(missing)} of {len(items)} have none: {listed(missing)}. "
            f"{HOW[0].upper()}{HOW[1:]}{instead}."
        )


def _devices(request: ScoreRequest) -> tuple[str, ...]:
    """One per process."""
    processes, gpus, device = request.processes, request.gpus, request.device
    if gpus is not None:
        return tuple(str(world.device(f"cuda:{rank}")) for rank in range(gpus))
    if processes is not None:
        return (str(world.device(device or "cpu")),) * processes
    return (str(world.device(device)),)


# --- the work -----------------------------------------------------------------------------------------------------------
def _fill(file: ScoreFile, work: Work, items: Sequence[Item], console: Console) -> tuple[int, dict[str, Any] | None, list[Problem]]:
    """Write what is missing. -> rows that were there, the difference of half precision, what went wrong with single images"""
    with team(work) as scorers:
        done = file.begin(_meta(work, items, scorers.ask("describe")), [item.name for item in items], work.chunk)
        if done:
            console.say(f"{file.path} has {done:,} of {len(items):,} images already; continuing.")
        difference = _half_precision(scorers, items[done : done + work.chunk], console)
        return done, difference, _score(scorers, file, items[done:], console)


def _meta(work: Work, items: Sequence[Item], described: dict[str, Any]) -> dict[str, Any]:
    """How the scores were made; what must be equal for a file to be continued."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.name, item.prompt]).encode())
    return {
        "tdpo": __version__,
        "folder": str(work.folder),
        "images": len(items),
        "list_sha256": digest.hexdigest(),  # of names and prompts
        "dtype": work.dtype,
        "batch_size": work.batch_size,
        "devices": list(work.devices),
        "rewards": described,
    }


def _half_precision(scorers: Team, items: Sequence[Item], console: Console) -> dict[str, Any] | None:
    """In half precision: how far the first batch's scores are from float32's."""
    if scorers.work.dtype == "fp32" or not items:
        return None
    difference = scorers.ask("half_precision_difference", items)
    rows = [[name, f"{one['max']:.1e}", f"{one['mean']:.1e}"] for name, one in difference.items()]
    console.table(["reward", "largest", "mean"], rows, title=f"|{scorers.work.dtype} score - fp32 score| on the first batch")
    return difference


def _score(scorers: Team, file: ScoreFile, items: Sequence[Item], console: Console) -> list[Problem]:
    """Append a row per image. -> what went wrong with single images"""
    problems: list[Problem] = []
    with console.progress("scoring", len(items)) as advance:
        for rows, new in scorers.score(items, advance):
            file.append(rows)
            for image, problem in new[: max(0, SHOWN_PROBLEMS - len(problems))]:
                console.warn(f"{image}: {problem}")
            problems += new
    if len(problems) > SHOWN_PROBLEMS:
        console.warn(f"... and {len(problems) - SHOWN_PROBLEMS} more; the rows without a number name them")
    return problems
