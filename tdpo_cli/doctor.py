"""What this machine can run: versions, devices, memory, disk, which checkpoint files are here, and whether a preset fits."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import Console, size
from tdpo_cli.errors import WorkError
from tdpo_cli.machine import memory
from tdpo_cli.machine.networks import guessed, is_sdxl, published
from tdpo_cli.rewards import checkpoints as reward_checkpoints
from tdpo_cli.rewards import required_files
from tdpo_cli.sandbox import EMBEDDED, ZOO, is_embedded

HF = str(Path(sys.executable).with_name("hf"))  # the hub's own command, installed beside this Python
NAMED = 3  # missing files in one sentence; the commands list all
LEAST_DISK = 5e9  # bytes; a run folder with its images and states
# what a part of a pipeline consists of, by its library; one weights file each, whatever variant it is
NETWORK_FILES = {"diffusers": ("config.json", "diffusion_pytorch_model.safetensors"), "transformers": ("config.json", "model.safetensors")}
CLIP_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# the parts of a base that is not here, whose model_index.json nobody can read
SD_PARTS = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "tokenizer": "clip", "scheduler": "scheduler"}
SDXL_PARTS = {**SD_PARTS, "text_encoder_2": "transformers", "tokenizer_2": "clip"}
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # no family reads them
OTHER_WEIGHTS = ("{stem}.safetensors.index.json", "{stem}.fp16.safetensors.index.json", "{stem}.fp16.safetensors", "{stem}.bin", "pytorch_model.bin")


def run(preset_name: str | None, console: Console, fetch: bool = False) -> dict[str, Any]:
    """Look, print, and -> the same for --json. `ok`: whether the preset (default: quickstart) could run here as it is.

    `fetch` downloads the preset's missing files first. Raises WorkError where the hub does not give one.
    """
    preset = presets.load(preset_name or "quickstart")
    if fetch:
        download(_needed_files(preset), console)
    devices = find_devices()
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": libraries(),
        "devices": devices,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "hub": {"cache": constants.HF_HUB_CACHE, "offline": bool(constants.HF_HUB_OFFLINE)},
        "rewards": {name: _files(required_files.of_reward(name)) for name in required_files.PUBLISHED},
        "preset": _preset(preset_name or "quickstart", preset, devices),
    }
    problems = [f"{name} {one['version'] or 'is missing'}, needs {one['needs']}" for name, one in report["libraries"].items() if not one["ok"]]
    if report["free_disk_bytes"] < LEAST_DISK:
        problems.append(f"only {size(report['free_disk_bytes'])} of disk are free here")
    report["problems"] = problems + report["preset"]["problems"]
    report["ok"] = not report["problems"]
    _show(report, console)
    return report


def download(files: list[required_files.File], console: Console) -> None:
    """Run the `hf download` commands of the files that are missing; they show their own progress. Raises WorkError."""
    for command in required_files.commands(files):
        console.say(command)
        done = subprocess.run([HF, *shlex.split(command)[1:]], env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}, stdout=sys.stderr)
        if done.returncode:
            raise WorkError(
                f"`{command}` failed (exit status {done.returncode}); its own message is above. A gated model (401, 403): accept the licence on the "
                "model's page, then `hf auth login`. What was downloaded is kept, and the same command continues."
            )


# --- the machine --------------------------------------------------------------------------------------------------------
def libraries() -> dict[str, dict[str, Any]]:
    """What tdpo needs -> the installed version, and whether it will do."""
    found = {}
    for line in metadata.requires("tdpo") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = {"version": version, "needs": str(requirement.specifier) or "any version", "ok": ok}
    return found


def find_devices() -> list[dict[str, Any]]:
    """The CPU, then every CUDA device, with total and free memory in bytes (None where unknown)."""
    total, free = _main_memory()
    found = [{"device": "cpu", "name": f"{os.cpu_count()} cores", "total_bytes": total, "free_bytes": free}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "total_bytes": total, "free_bytes": free})
    return found


_main_memory = memory.main_memory


# --- the preset ---------------------------------------------------------------------------------------------------------
def _preset(name: str, preset: Preset, devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Its files and its memory on what would be used here: all GPUs, or the CPU."""
    used = [device for device in devices if device["device"] != "cpu"] or devices[:1]
    limits = [device["free_bytes"] or device["total_bytes"] for device in used]
    limit = None if None in limits else min(limits)
    count = len(used) if used[0]["device"] != "cpu" else 1
    gpu = used[0]["device"] != "cpu"
    at_least = min(memory.estimate(preset, count, plan, gpu) for plan in memory.ladder(preset, gpu))
    fits = limit is None or at_least < memory.MARGIN * limit
    plan = memory.choose(preset, memory.limit(preset, limit, gpu, count) if fits else at_least, count, gpu)  # as training chooses it
    files = _needed_files(preset)
    missing = [file.name for file in files if file.path is None]
    named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    problems = [f"{len(missing)} files of {name} are missing: {named}"] if missing else []
    if not fits:
        problems.append(f"{name} needs about {size(at_least)} of memory on each device, and {size(limit)} are free on {used[0]['device']}")
    return {
        "name": name,
        "devices": [device["device"] for device in used],
        "least_memory_bytes": at_least,
        "memory_bytes": memory.estimate(preset, count, plan, gpu),
        "free_memory_bytes": limit,
        "micro_batch": plan.micro_batch,
        "plan": plan.as_dict(),
        "fits": fits,
        "cards": {} if gpu or is_embedded(preset.model.base) or guessed(preset) else memory.cards(preset),
        **_files(files),
        "problems": problems,
    }


def _needed_files(preset: Preset) -> list[required_files.File]:
    checkpoints = reward_checkpoints(preset.reward.zoo, preset.reward.checkpoints)
    rewards = [file for name in preset.rewards for file in required_files.of_reward(name, checkpoints.get(name))]
    if preset.has_critic and preset.reward.train not in ("pickscore", "hpsv2", "hpsv2.1"):  # the critic sees through the aesthetic reward's CLIP
        rewards += [file for file in required_files.of_reward("aesthetic", checkpoints.get("aesthetic")) if "aesthetic" not in file.hub_id]
    lists = [source for source in (preset.rollout.prompts, preset.rollout.eval_prompts) if source and source.startswith("hpsv2:")]
    prompts = required_files.on_hub("zhwang/HPDv2", [f"benchmark/{source.removeprefix('hpsv2:')}.json" for source in lists], repo_type="dataset")
    return list(dict.fromkeys([*_base_model(preset), *rewards, *prompts]))


def _base_model(preset: Preset) -> list[required_files.File]:
    base = preset.model.base
    folder = ZOO / EMBEDDED[base] if is_embedded(base) else Path(base).expanduser()
    own_vae = preset.model.vae
    parts = {part: kind for part, kind in _parts(base, folder, preset.model.revision).items() if part != "vae" or own_vae is None}
    names = [*(f"{part}/{name}" for part, kind in parts.items() for name in _files_of(kind)), "model_index.json"]
    files = _found(base, folder, names, preset.model.revision)
    if own_vae is not None:
        place = Path(own_vae).expanduser()
        inside = "vae/" if (place / "vae").is_dir() else ""
        files += _found(own_vae, place, [f"{inside}{name}" for name in NETWORK_FILES["diffusers"]], None)
    return files


def _parts(base: str, folder: Path, revision: str | None) -> dict[str, str]:
    """The parts that a pipeline's model_index.json lists -> what they consist of; the published ones where there is no such file yet."""
    file = folder / "model_index.json"
    if not folder.is_dir() and base.count("/") == 1:
        (cached,) = required_files.on_hub(base, ["model_index.json"], revision)
        file = Path(cached.path) if cached.path else file
    if not file.is_file():
        return SDXL_PARTS if is_sdxl(Path(base)) else _published_parts(base) or SD_PARTS
    found = {}
    for part, entry in json.loads(file.read_text(encoding="utf-8")).items():
        if part.startswith("_") or part in UNUSED_PARTS or not isinstance(entry, list) or entry[-1] is None:
            continue
        library, cls = entry
        if part.startswith("tokenizer"):
            found[part] = "clip" if cls.startswith("CLIP") else "tokenizer"
        else:
            found[part] = "scheduler" if part == "scheduler" else library
    return found


def _published_parts(base: str) -> dict[str, str] | None:
    """Of a flow model: whole folders, since how its weights are split among files is known once its indices are here."""
    known = published(base)
    if known is None:
        return None
    networks = list(known[1])
    return {part: "folder" for part in (*networks, *(part.replace("text_encoder", "tokenizer") for part in networks if "text" in part), "scheduler")}


def _files_of(kind: str) -> tuple[str, ...]:
    others = {"folder": ("",), "clip": CLIP_TOKENIZER, "tokenizer": ("tokenizer_config.json",), "scheduler": ("scheduler_config.json",)}
    return others.get(kind) or NETWORK_FILES.get(kind, ("config.json",))


def _found(source: str, folder: Path, names: list[str], revision: str | None) -> list[required_files.File]:
    """Where the files of a folder or hub id are; without a path those that are missing."""
    if not folder.is_dir() and source.count("/") == 1:
        cached = required_files.on_hub(source, names, revision)
        return [file if file.path else _other_weights_in_cache(file, revision) for file in cached]
    return [required_files.File(name, str(folder), _present(folder, name), source, f" --local-dir {folder}") for name in names]


def _alternatives(name: str) -> list[str]:
    part, slash, file = name.rpartition("/")
    stem = file.removesuffix(".safetensors")
    return [f"{part}{slash}{other.format(stem=stem)}" for other in OTHER_WEIGHTS] if file.endswith(".safetensors") else []


def _other_weights_in_cache(file: required_files.File, revision: str | None) -> required_files.File:
    for name in _alternatives(file.name):
        (other,) = required_files.on_hub(file.hub_id, [name], revision)
        if other.path:
            return other
    return file


def _present(folder: Path, name: str) -> str | None:
    return next((str(folder / one) for one in (name, *_alternatives(name)) if (folder / one).is_file()), None)


def _files(files: list[required_files.File]) -> dict[str, Any]:
    shown = [{key: value for key, value in dataclasses.asdict(file).items() if key in ("name", "source", "path")} for file in files]
    return {"present": all(file.path for file in files), "files": shown, "commands": required_files.commands(files)}


# --- for people ---------------------------------------------------------------------------------------------------------
def _show(report: dict[str, Any], console: Console) -> None:
    console.pairs([("python", report["python"]), *((name, str(one["version"])) for name, one in report["libraries"].items())], title="versions")
    devices = [(one["device"], f"{one['name']}, {_size(one['total_bytes'])} of memory, {_size(one['free_bytes'])} free") for one in report["devices"]]
    offline = " (HF_HUB_OFFLINE is set)" if report["hub"]["offline"] else ""
    console.pairs([*devices, ("disk", f"{size(report['free_disk_bytes'])} free"), ("hub cache", report["hub"]["cache"] + offline)], title="machine")
    console.pairs([(name, _state(one)) for name, one in report["rewards"].items()], title="published rewards")
    one = report["preset"]
    rows = [
        ("files", _state(one)),
        ("memory", f"about {size(one['memory_bytes'])} on {', '.join(one['devices'])}; {_size(one['free_memory_bytes'])} free"),
        ("plan", str(memory.Plan(**one["plan"]))),
        *memory.card_lines(one["cards"]),
    ]
    console.pairs(rows, title=f"preset {one['name']}")
    if one["cards"]:
        console.say("  Memory is a prediction. A card's line is for one process that has it alone.")
    verdict = "could run here now" if report["ok"] else "cannot run here yet: " + "; ".join(report["problems"])
    console.say(f"{one['name']} {verdict}", style="green" if report["ok"] else "yellow")


def _state(one: dict[str, Any]) -> str:
    if one["present"]:
        return "all here"
    missing = sum(file["path"] is None for file in one["files"])
    return f"{missing} of {len(one['files'])} missing; fetch with:" + "".join(f"\n      {command}" for command in one["commands"])


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)
