"""Base model and checkpoints on the same held-out prompts and noise, judged by several rewards: tables, curves, a verdict."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tdpo_cli import __version__
from tdpo_cli.config import prompts
from tdpo_cli.console import Console, duration
from tdpo_cli.cross_eval import candidates, result
from tdpo_cli.cross_eval.candidates import Model
from tdpo_cli.cross_eval.evaluate import Evaluator, fetch, prompts_at_once
from tdpo_cli.cross_eval.folder import Folder, Part
from tdpo_cli.cross_eval.request import CrossEvalRequest
from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.machine import memory, world
from tdpo_cli.report import cross_eval_page as page
from tdpo_cli.report import cross_eval_tables as tables
from tdpo_cli.report import model_card, png

BATCH_SIZE = 16  # images per network call at most; a part of the work is as large


def run(request: CrossEvalRequest, console: Console) -> dict[str, Any]:
    """Evaluate, each process its share; continue where a killed one stopped. -> a summary for --json. Raises RequestError, WorkError."""
    started = time.perf_counter()
    team = world.current(str(world.device(request.device)))
    folder = Folder(request.out)
    task, finished, named = team.from_main(_task(request, folder, team.device, console) if team.is_main else None)
    compared = [Model.of(entry) for entry in task["models"]]
    if not finished:
        _evaluate(task, compared, folder, team, console)
    report = {}
    if team.is_main:
        folder.lock()
        if not finished:
            at_once = prompts_at_once(task)
            folder.still_there()
            parts = {model.name: folder.read_parts(model.name, task, at_once) for model in compared}
            folder.write_result(result.build(task, compared, parts))
            folder.forget_parts()
        content = folder.read_result()
        with _damage_named(folder) if finished else contextlib.nullcontext():
            report = _draw(content, folder, console)
        _complete_cards([model for model in compared if model.sampling.checkpoint.weights in named], content, console)
        report["seconds"] = time.perf_counter() - started
        images = len(task["prompts"]) * task["per_prompt"]
        done = "drawn anew from the cross_eval.json that was there" if finished else duration(report["seconds"])
        console.say(f"{len(compared)} models, {images} images each, in {request.out} ({done}). Start with {report['page']}.")
    team.close()
    return report


@contextlib.contextmanager
def _damage_named(folder: Folder) -> Iterator[None]:
    """A cross_eval.json that was there may hold anything: what cannot be drawn is damage, not a fault of the drawing. Raises RequestError."""
    try:
        yield
    except RequestError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise RequestError(f"{folder.result}: damaged: {problem}. Remove it together with the folder, or choose another --out.") from error


# --- the task: the request with everything resolved, as request.json holds it ---------------------------------------------
def _task(request: CrossEvalRequest, folder: Folder, device: torch.device, console: Console) -> tuple[dict[str, Any], bool, set[str | None]]:
    """What is to be evaluated, or what the folder has already; whether that is finished; the weights that are named now. Raises RequestError."""
    before = folder.read_request()
    found, presets = candidates.find(request.models, request.preset, request.overrides, request.epochs)
    source = candidates.shared_prompt_source(request.prompts, presets)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    task = {
        "tdpo": __version__,
        "checkpoints": [str(Path(argument).resolve()) if Path(argument).exists() else argument for argument in request.models],
        "epochs": list(request.epochs),
        "seed": request.seed,
        "per_prompt": request.per_prompt,
        "prompt_source": source,
        "prompts": prompts.load(source),
        "rewards": candidates.shared_rewards(request.rewards, presets),
        "batch_size": request.batch_size or min(BATCH_SIZE, *(memory.sample_batch(one, free) for one in presets)),
        "models": [model.as_dict() for model in found],
    }
    named = {model.sampling.checkpoint.weights for model in found}
    if before is None:
        return task, False, named
    finished = folder.result.exists()
    _must_be_the_same(before, task, request.batch_size is None, finished, folder)
    if len(found) > len(before["models"]):
        console.warn(f"{folder.path} was begun with {len(before['models'])} of now {len(found)} models; choose another --out for all.")
    return before, finished, named


def _must_be_the_same(before: Mapping[str, Any], now: Mapping[str, Any], any_batch_size: bool, finished: bool, folder: Folder) -> None:
    """Raises RequestError. Checkpoints that came or went since do not matter: the list is the one of the beginning."""
    ignored = {"models"} | ({"batch_size"} if any_batch_size else set()) | ({"tdpo"} if finished else set())
    keys = [key for key in now if key not in ignored and before.get(key) != now[key]]
    different = [f"{key} is {_brief(before.get(key))}, asked for {_brief(now[key])}" for key in keys]
    recorded = {model["name"]: model for model in before["models"]}
    for model in now["models"]:
        old = recorded.get(model["name"], model)
        if (old["sampling"], old["sha256"]) != (model["sampling"], model["sha256"]):
            different.append(f"{model['name']} has other {'weights' if old['sampling'] == model['sampling'] else 'sampling settings'} now")
    if different:
        raise RequestError(f"{folder.path} holds a cross-evaluation with other arguments: {'; '.join(different)}. Choose another --out.")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(value)
    return f"{len(value)} entries" if isinstance(value, list) and len(value) > 4 else str(value)


# --- the work -----------------------------------------------------------------------------------------------------------
def _evaluate(task: dict[str, Any], compared: Sequence[Model], folder: Folder, team: world.World, console: Console) -> None:
    """Do the parts that are missing, each process a run of neighbours, so that it loads few models."""
    with console.working("loading"), team.first_on_each_machine() if world.may_download() else contextlib.nullcontext():
        if team.local_rank == 0:
            fetch(compared, team.device)
        evaluator = Evaluator(task, compared, folder, team.device, console)
    missing = team.from_main(_begin(task, evaluator, folder, console) if team.is_main else None)
    folder.watch()
    evaluator.run(missing[team.share(len(missing))])
    team.barrier()


def _begin(task: dict[str, Any], evaluator: Evaluator, folder: Folder, console: Console) -> list[Part]:
    """Write down what will be done, only now that all could be loaded. -> the parts to do. Raises RequestError."""
    task = {**task, "reward_files": evaluator.judges.describe()}
    folder.lock()
    before = folder.read_request()
    if before is None:
        folder.begin(task)
    elif before != json.loads(json.dumps(task)):  # the files of the rewards, or all, if another process began here meanwhile
        raise RequestError(f"{folder.path}: the files of the rewards have changed since it was begun, or it was begun anew; choose another --out.")
    names, at_once = [model["name"] for model in task["models"]], prompts_at_once(task)
    missing = folder.missing(names, len(task["prompts"]), at_once)
    images = len(task["prompts"]) * task["per_prompt"]
    bases = sum(entry["base"] is None for entry in task["models"])
    console.pairs([
        ("models", f"{bases} base, {len(names) - bases} to compare with it"),
        ("prompts", f"{len(task['prompts'])} of {task['prompt_source']}, {task['per_prompt']} each: {images} images a model"),
        ("rewards", ", ".join(task["rewards"])),
        ("folder", f"{folder.path} (the same command with this --out goes on after an interruption)"),
    ], title=f"tdpo {__version__}: cross-evaluation")  # fmt: skip
    total = len(names) * -(-len(task["prompts"]) // at_once)
    if len(missing) < total:
        console.say(f"{total - len(missing)} of {total} parts are there already; continuing.")
    return missing


def _complete_cards(compared: Sequence[Model], content: Mapping[str, Any], console: Console) -> None:
    """The table goes into the model card of every checkpoint of a run, too; the folder's request alone names no file to write."""
    for model in compared:
        if model.run is not None and (problem := model_card.add_cross_eval(Path(model.sampling.checkpoint.weights), content, model.name)):
            console.warn(problem)


# --- what is drawn from cross_eval.json ---------------------------------------------------------------------------------
def _draw(content: dict[str, Any], folder: Folder, console: Console) -> dict[str, Any]:
    """The other files and the terminal's tables. -> a summary"""
    texts = {"csv": tables.as_csv(content), "md": tables.as_markdown(content), "html": page.render(content, folder.path)}
    for suffix, text in texts.items():
        folder.write(f"cross_eval.{suffix}", text)
    folder.write("cross_eval.png", png.cross_eval(content))
    tables.show(content, console)
    lost = sum(score is None for model in content["models"] for rows in model["scores"].values() for row in rows for score in row)
    if lost:
        console.warn(f"{lost} scores are missing (not finite); they are left out of every number, pair by pair.")
    console.say()
    return {
        "out": str(folder.path),
        "result": str(folder.result),
        "page": str(folder.path / "cross_eval.html"),
        "models": [model["name"] for model in content["models"]],
        "rewards": content["rewards"],
        "missing_scores": lost,
        "verdicts": {one["run"]: one["verdict"] for one in content["runs"]},
    }
