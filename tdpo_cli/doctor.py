"""What this machine can run: versions, devices, memory, disk, which checkpoint files are here, and whether a preset fits."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from tdpo_cli.config import preset as presets
from tdpo_cli.config.preset import Preset
from tdpo_cli.console import Console, size
from tdpo_cli.machine import memory
from tdpo_cli.rewards import required_files, scoring
from tdpo_cli.sandbox import ZOO

LEAST_DISK = 5e9  # bytes; a run folder with its images and states
# what models/sd.py reads of a pipeline; one weights file each, whatever variant it is
BASE_MODEL = {
    "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    "scheduler": ("scheduler_config.json",),
}
OTHER_WEIGHTS = ("{stem}.fp16.safetensors", "{stem}.bin", "pytorch_model.bin")


def run(preset_name: str | None, console: Console) -> dict[str, Any]:
    """Look, say, and -> the same for --json. `ok`: whether the preset (default: quickstart) could run here as it is."""
    preset = presets.load(preset_name or "quickstart")
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
    plan = memory.choose(preset, memory.limit(preset, limit, gpu) if fits else None, count, gpu)  # as training chooses it
    files = _needed_files(preset)
    commands = required_files.commands(files)
    problems = [f"{sum(file.path is None for file in files)} files of {name} are missing"] if commands else []
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
        **_files(files),
        "problems": problems,
    }


def _needed_files(preset: Preset) -> list[required_files.File]:
    checkpoints = scoring.checkpoints(preset.reward.zoo, preset.reward.checkpoints)
    rewards = [file for name in preset.rewards for file in required_files.of_reward(name, checkpoints.get(name))]
    if preset.has_critic and preset.reward.train not in ("pickscore", "hpsv2", "hpsv2.1"):  # the critic sees through the aesthetic reward's CLIP
        rewards += [file for file in required_files.of_reward("aesthetic", checkpoints.get("aesthetic")) if "aesthetic" not in file.hub_id]
    lists = [source for source in (preset.rollout.prompts, preset.rollout.eval_prompts) if source and source.startswith("hpsv2:")]
    prompts = required_files.on_hub("zhwang/HPDv2", [f"benchmark/{source.removeprefix('hpsv2:')}.json" for source in lists], repo_type="dataset")
    return list(dict.fromkeys([*_base_model(preset), *rewards, *prompts]))


def _base_model(preset: Preset) -> list[required_files.File]:
    base = preset.model.base
    folder = ZOO / "pipeline" if base == "sandbox" else Path(base).expanduser()
    names = [f"{part}/{name}" for part, files in BASE_MODEL.items() for name in files]
    if not folder.is_dir() and base.count("/") == 1:
        cached = required_files.on_hub(base, names, preset.model.revision)
        return [file if file.path else _other_weights_in_cache(file, preset.model.revision) for file in cached]
    return [required_files.File(name, str(folder), _present(folder, name), base, f" --local-dir {folder}") for name in names]


def _alternatives(name: str) -> list[str]:
    part, _, file = name.partition("/")
    stem = file.removesuffix(".safetensors")
    return [f"{part}/{other.format(stem=stem)}" for other in OTHER_WEIGHTS] if file.endswith(".safetensors") else []


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
    where = f"{', '.join(one['devices'])} with {memory.Plan(**one['plan'])}"
    memory_line = f"about {size(one['memory_bytes'])} on {where}; {_size(one['free_memory_bytes'])} free"
    console.pairs([("files", _state(one)), ("memory", memory_line)], title=f"preset {one['name']}")
    verdict = "could run here now" if report["ok"] else "cannot run here yet: " + "; ".join(report["problems"])
    console.say(f"{one['name']} {verdict}", style="green" if report["ok"] else "yellow")


def _state(one: dict[str, Any]) -> str:
    if one["present"]:
        return "all here"
    missing = sum(file["path"] is None for file in one["files"])
    return f"{missing} of {len(one['files'])} missing; fetch with:" + "".join(f"\n      {command}" for command in one["commands"])


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)
