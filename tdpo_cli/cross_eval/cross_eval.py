"""Base model and checkpoints on the same held-out prompts and noise, judged by several rewards: tables, curves, a verdict."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tdpo_cli import __version__
from tdpo_cli.console import Console, duration
from tdpo_cli.cross_eval import candidates, evaluate, figure
from tdpo_cli.cross_eval.candidates import Model, Sampling
from tdpo_cli.cross_eval import result, tables
from tdpo_cli.cross_eval.folder import Folder, write_json
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import memory, world
from tdpo_cli.report import cross_eval_page as page
from tdpo_cli.report import model_card
from tdpo_cli.storage import disk

BATCH_SIZE = 16  # images per network call at most; a part of the work is as large


def run(
    arguments: Sequence[str], wanted: str, prompts: str | None, per_prompt: int, seed: int, out: Path, preset: str | None,
    overrides: Sequence[tuple[str, Any]], epochs: Sequence[int], batch_size: int | None, device: str | None, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate into `out`, each process its share; go on where a killed one stopped. -> a summary for --json. Raises RequestError, WorkError."""
    started = time.perf_counter()
    team = world.current(str(world.device(device)))
    folder = Folder(out)
    request, finished = team.from_main(
        _request(arguments, wanted, prompts, per_prompt, seed, preset, overrides, epochs, batch_size, team, folder, console)
        if team.is_main else None
    )  # fmt: skip
    compared = [_model(entry) for entry in request["models"]]
    if not finished:
        _evaluate(request, compared, folder, team, console)
    report = {}
    if team.is_main:
        folder.lock()
        if not finished:
            at_once = _prompts_at_once(request)
            parts = {model.name: folder.read_parts(model.name, len(request["prompts"]), at_once) for model in compared}
            write_json(folder.result, result.build(request, compared, parts), indent=1)
            folder.forget_parts()
        content = folder.read_result()
        report = _draw(content, folder, console)
        _complete_cards(compared, content, console)
        report["seconds"] = time.perf_counter() - started
        images = len(request["prompts"]) * request["per_prompt"]
        done = "drawn anew from the cross_eval.json that was there" if finished else duration(report["seconds"])
        console.say(f"{len(compared)} models, {images} images each, in {out} ({done}). Start with {report['page']}.")
    team.close()
    return report


# --- the request --------------------------------------------------------------------------------------------------------
def _request(
    arguments: Sequence[str], wanted: str, prompts: str | None, per_prompt: int, seed: int, preset: str | None,
    overrides: Sequence[tuple[str, Any]], epochs: Sequence[int], batch_size: int | None, team: world.World, folder: Folder, console: Console,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """What is to be evaluated, as JSON, or as the folder has it already; and whether that is finished. Raises RequestError."""
    before = folder.read_request()
    found, presets = candidates.find(arguments, preset, overrides, epochs)
    source, texts = candidates.shared_prompts(prompts, presets)
    free = torch.cuda.mem_get_info(team.device)[0] if team.device.type == "cuda" else None
    request = {
        "tdpo": __version__,
        "checkpoints": [str(Path(argument).resolve()) if Path(argument).exists() else argument for argument in arguments],
        "epochs": list(epochs),
        "seed": seed,
        "per_prompt": per_prompt,
        "prompt_source": source,
        "prompts": texts,
        "rewards": candidates.shared_rewards(wanted, presets),
        "batch_size": batch_size or min(BATCH_SIZE, *(memory.sample_batch(one, free) for one in presets)),
        "models": [asdict(model) for model in found],
    }
    if before is None:
        return request, False
    finished = folder.result.exists()
    _must_be_the_same(before, request, batch_size is None, finished, folder)
    if len(found) > len(before["models"]):
        console.warn(f"{folder.path} was begun with {len(before['models'])} of now {len(found)} models; choose another --out for all.")
    return before, finished


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


def _model(entry: Mapping[str, Any]) -> Model:
    return Model(**{**entry, "sampling": Sampling(**entry["sampling"])})


def _prompts_at_once(request: Mapping[str, Any]) -> int:
    """Prompts of one part: fixed, so that neither processes nor interruptions change which images share a network call."""
    return max(1, request["batch_size"] // request["per_prompt"])


# --- the work -----------------------------------------------------------------------------------------------------------
def _evaluate(request: dict[str, Any], compared: Sequence[Model], folder: Folder, team: world.World, console: Console) -> None:
    """Do the parts that are missing, each process a run of neighbours, so that it loads few models."""
    with console.working("loading"), team.first_on_each_machine() if world.may_download() else contextlib.nullcontext():
        if team.local_rank == 0:
            evaluate.fetch(compared, team.device)
        judges = evaluate.Judges(request["rewards"], request["per_prompt"] > 1, team.device, console.warn)
    prompts, names = request["prompts"], [model.name for model in compared]
    missing = team.from_main(_begin(request, judges, folder, names, console) if team.is_main else None)
    mine = missing[team.share(len(missing))]
    steps = sum((end - first) * request["per_prompt"] * compared[number].sampling.steps for number, first, end in mine)
    with console.progress("sampling and scoring", steps) as advance:
        evaluate.do(
            mine, compared, prompts, request["per_prompt"], request["seed"], request["batch_size"],
            judges, folder, team.device, advance, console.warn,
        )  # fmt: skip
    team.barrier()


def _begin(request: dict[str, Any], judges: evaluate.Judges, folder: Folder, names: Sequence[str], console: Console) -> list:
    """Write down what will be done, only now that all could be loaded. -> the parts to do. Raises RequestError."""
    request = {**request, "reward_files": judges.describe()}
    folder.lock()
    before = folder.read_request()
    if before is None:
        folder.begin(request)
    elif before != json.loads(json.dumps(request)):  # the files of the rewards, or all, if another process began here meanwhile
        raise RequestError(f"{folder.path}: the files of the rewards have changed since it was begun, or it was begun anew; choose another --out.")
    at_once = _prompts_at_once(request)
    missing = folder.missing(names, len(request["prompts"]), at_once)
    images = len(request["prompts"]) * request["per_prompt"]
    bases = sum(entry["base"] is None for entry in request["models"])
    console.pairs([
        ("models", f"{bases} base, {len(names) - bases} to compare with it"),
        ("prompts", f"{len(request['prompts'])} of {request['prompt_source']}, {request['per_prompt']} each: {images} images a model"),
        ("rewards", ", ".join(request["rewards"])),
        ("folder", f"{folder.path} (the same command with this --out goes on after an interruption)"),
    ], title=f"tdpo {__version__}: cross-evaluation")  # fmt: skip
    total = len(names) * -(-len(request["prompts"]) // at_once)
    if len(missing) < total:
        console.say(f"{total - len(missing)} of {total} parts are there already; continuing.")
    return missing


def _complete_cards(compared: Sequence[Model], content: Mapping[str, Any], console: Console) -> None:
    """The table goes into the model card of every checkpoint of a run, too."""
    for model in compared:
        if model.run is not None and (problem := model_card.add_cross_eval(Path(model.sampling.start_from), content, model.name)):
            console.warn(problem)


# --- what is drawn from cross_eval.json ---------------------------------------------------------------------------------
def _draw(content: dict[str, Any], folder: Folder, console: Console) -> dict[str, Any]:
    """The other files and the terminal's tables. -> a summary"""
    texts = {"csv": tables.as_csv(content), "md": tables.as_markdown(content), "html": page.render(content, folder.path)}
    for suffix, text in texts.items():
        disk.write_text(folder.path / f"cross_eval.{suffix}", text)
    disk.write_bytes(folder.path / "cross_eval.png", figure.cross_eval(content))
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
