"""Everything the product does, at the full architectures with random weights: epochs by phase, torch.compile, and the commands."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matmul
import pipelines
import torch
from calls import Calls, Meter
from phases import Epochs
from timing import interleave, ratios, seconds, spread
from torch.utils.flop_counter import FlopCounterMode

from tdpo_cli.cli import app
from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.machine import memory
from tdpo_cli.machine.world import World
from tdpo_cli.train.metrics import peak_memory
from tdpo_cli.train.state import build

# a phase of the product -> the part of the plan's prediction that covers it
PREDICTED = {"rollout": "sampling", "critic's view": "decoding", "score": "scoring", "update": "training"}
DTYPES = ("fp16", "bf16")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Amount:
    """How much work an epoch is."""

    samples: int
    steps: int
    batch: int
    pixels: int | None = None  # None: the family's own
    rounds: int = 2  # paired runs


FULL = {"sd1": Amount(16, 10, 8), "sdxl": Amount(8, 6, 4), "sd35": Amount(16, 10, 8)}
TINY = Amount(4, 3, 2, pixels=64)


class Deadline:
    """Sections begin only while there is time; the report says which were left out and which failed.

    What a section found is also printed to standard error at once: a run that is stopped has shown something.
    """

    def __init__(self, minutes: float):
        self.end, self.left_out, self.failed = time.monotonic() + 60 * minutes, [], {}

    def section(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, or NOT_MEASURED. One section's failure does not end the others."""
        if time.monotonic() > self.end:
            self.left_out.append(name)
            return NOT_MEASURED
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sections are still worth measuring
            self.failed[name] = f"{type(error).__name__}: {error}"
            found = NOT_MEASURED
        print(f"{name}, {time.monotonic() - began:.0f} s: {json.dumps(self.failed.get(name, found))}", file=sys.stderr, flush=True)
        return found


class MemoryMeter(Meter):
    """Also the peak of every phase. A GPU's count begins anew with each; of a process only the peak so far is known."""

    def __init__(self, device: torch.device, synchronize: Callable[[], None]):
        super().__init__(synchronize)
        self.device, self.peaks = device, {}

    def _book(self) -> None:
        super()._book()
        if self.stack:
            self.peaks[self.stack[-1]] = max(self.peaks.get(self.stack[-1], 0), peak_memory(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


# --- the preset -----------------------------------------------------------------------------------------------------------
def settings(family: str, base: Path, reward: Path, amount: Amount, dtype: str) -> dict[str, Any]:
    """What is changed of the family's preset: less work, one reward, networks from the two folders."""
    return {
        "model.base": str(base), "model.dtype": dtype, "model.resolution": amount.pixels or pipelines.FAMILIES[family].pixels,
        "rollout.prompts": "simple-animals", "rollout.eval_prompts": "simple-animals:held-out", "rollout.samples_per_epoch": amount.samples,
        "rollout.steps": amount.steps, "reward.train": "aesthetic", "reward.watch": [], "reward.checkpoints.aesthetic": str(reward),
        "reward.min_count": 1, "update.batch_size": amount.batch, "run.preview_images": 0,
        **({"model.vae": None} if family == "sdxl" else {}), **({"sampling.steps": amount.steps} if family == "sd35" else {}),
    }  # fmt: skip


def preset_of(family: str, changes: dict[str, Any]) -> Preset:
    return presets.load(pipelines.FAMILIES[family].preset, list(changes.items()))


def plan_of(preset: Preset, device: torch.device) -> memory.Plan:
    """As the product chooses it; on a GPU not more than the epoch has."""
    if device.type != "cuda":
        return memory.Plan.of(preset.rollout.samples_per_epoch)
    plan = memory.choose(preset, int(memory.MARGIN * torch.cuda.mem_get_info(device)[0]))
    samples = preset.rollout.samples_per_epoch
    return dataclasses.replace(plan, micro_batch=min(plan.micro_batch, preset.update.batch_size), sample_batch=min(plan.sample_batch, samples))


# --- sections -------------------------------------------------------------------------------------------------------------
def epoch(preset: Preset, device: torch.device, rounds: int, compiled: bool, deadline: Deadline, name: str) -> dict[str, Any]:
    """One precision: phases against bare calls, share of the matrix-product rate, memory against the plan, drift; then torch.compile."""
    plan, gpu = plan_of(preset, device), device.type == "cuda"
    epochs = Epochs(build(preset, World(device=device), plan))
    meter = MemoryMeter(device, epochs.synchronize)
    calls = Calls()
    with calls.recording(meter):  # also the first epoch, whose time is not taken
        epochs.run(meter)
    predicted = memory.phases(preset, 1, plan, gpu)
    dtype = epochs.job.policy.family.network.dtype
    report: dict[str, Any] = {
        "computed_in": str(dtype).removeprefix("torch."), "plan": plan.as_dict(), **drift(epochs, preset),
        "memory": {phase: {"peak": meter.peaks[phase], "predicted": predicted[part]} for phase, part in PREDICTED.items()},
    }  # fmt: skip
    clock = 0 if gpu else 1
    timed = interleave({"product": epochs.run, "bare": lambda: calls.timed(epochs.synchronize)}, rounds)
    rate, names = matmul.rate(device, dtype), list(timed["bare"][0])
    report["flop_per_second"] = rate
    report["overhead"] = {phase: spread(ratios(timed["product"], timed["bare"], phase, clock)) for phase in [*names, "epoch"]}
    report["seconds"] = {phase: statistics.median(seconds(timed["product"], phase, clock)) for phase in [*names, "epoch"]}
    report["mfu"] = {phase: operations(calls, phase) / report["seconds"][phase] / rate for phase in names}
    if compiled:
        report["compile"] = deadline.section(f"{name}, compile", lambda: compile_(epochs, preset, rounds, clock, report["seconds"]["epoch"]))
    return report


def drift(epochs: Epochs, preset: Preset) -> dict[str, float]:
    """Largest |log ratio| before the first optimizer step, where it should be 0, beside the clip range."""
    found, clip = epochs.row["ratio_drift"], preset.update.clip_range
    return {"ratio_drift": found, "clip_range": clip, "drift_share": found / clip}


def operations(calls: Calls, phase: str) -> int:
    with FlopCounterMode(display=False) as counter:
        calls.replay(phase)
    return counter.get_total_flops()


def compile_(epochs: Epochs, preset: Preset, rounds: int, clock: int, eager: float) -> dict[str, Any]:
    """torch.compile of the denoiser's blocks, last because it stays: warm-up, gain, and the epoch at which it has paid."""
    spent = lambda: sum(times[clock] for times in epochs.run().values())
    epochs.job.policy.cut_up(checkpointing=False, compile=True)
    first = spent()
    later = statistics.median(spent() for _ in range(rounds))
    saved = eager - later
    return {
        "warm_up_seconds": first - later, "epoch_gain": eager / later, "break_even_epoch": (first - later) / saved if saved > 0 else None,
        **drift(epochs, preset),
    }  # fmt: skip


def commands(family: str, changes: dict[str, Any], folder: Path, device: str, deadline: Deadline) -> dict[str, Any]:
    """Two epochs, one more by --resume, images of the result, their scores: seconds of each command, and what it left."""
    run, images, scores = folder / "run", folder / "images", folder / "scores.jsonl"
    pairs = [f"{key}={'none' if value is None else json.dumps(value) if isinstance(value, list) else value}" for key, value in changes.items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    reward = changes["reward.checkpoints.aesthetic"]
    steps = {
        "train": ["train", "--preset", pipelines.FAMILIES[family].preset, *options, "--epochs", "2", "--out", str(run), "--quiet"],
        "resume": ["train", "--resume", "--out", str(run), "--epochs", "3", "--quiet"],
        "sample": ["sample", str(run), "a cat", "a dog", "--out", str(images), "--device", device, "--quiet"],
        "score": [
            "score", str(images), "--rewards", "aesthetic", "--checkpoint", f"aesthetic={reward}", "--device", device, "--out", str(scores),
            "--quiet",
        ],
    }  # fmt: skip
    report: dict[str, Any] = {}
    for name, arguments in steps.items():
        began = time.perf_counter()
        if deadline.section(f"{family}, tdpo {name}", lambda arguments=arguments: app(arguments, standalone_mode=False) or True) == NOT_MEASURED:
            return {**report, name: NOT_MEASURED}
        report[name] = time.perf_counter() - began
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report["epochs"] = [row["epoch"] for row in rows]
    report["weights_moved"] = all(row["updates"] > 0 and row["policy_grad_norm"] > 0 for row in rows)
    report["images"] = len(list(images.glob("*-*.png")))
    report["scores"] = [json.loads(line)["aesthetic"] for line in scores.read_text().splitlines() if "aesthetic" in json.loads(line)]
    return report


def measure(family: str, device: torch.device, folder: Path, full: bool, amount: Amount, compiled: bool, minutes: float) -> dict[str, Any]:
    """All sections of one family."""
    deadline = Deadline(minutes)
    base = pipelines.pipeline(family, folder / "pipeline", full, str(device))
    reward = pipelines.reward(folder / "reward", "full" if full else "tiny", str(device))
    report: dict[str, Any] = {"amount": dataclasses.asdict(amount), "full": full, "dtypes": {}}
    for dtype in DTYPES:
        preset = preset_of(family, settings(family, base, reward, amount, dtype))
        last = compiled and dtype == DTYPES[-1]
        work = lambda preset=preset, last=last, dtype=dtype: epoch(preset, device, amount.rounds, last, deadline, f"{family}, {dtype}")
        report["dtypes"][dtype] = deadline.section(f"{family}, {dtype}", work)
        torch.compiler.reset()
        release(device)
    changes = settings(family, base, reward, amount, "bf16" if family == "sd35" else "fp16")
    report["commands"] = commands(family, changes, folder, device.type, deadline)
    return report | {"left_out": deadline.left_out, "failed": deadline.failed}


def release(device: torch.device) -> None:
    """What nothing refers to any more goes back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- tables ---------------------------------------------------------------------------------------------------------------
def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per family and precision."""
    columns = (f"{phase}: seconds, overhead, share, peak / predicted" for phase in PREDICTED)
    head = ["family", "asked, computed", "drift / clip range", *columns, "compile"]
    lines = [" | ".join(["", *head, ""]).strip(), "|---" * len(head) + "|"]
    for family, report in reports.items():
        for dtype, one in report["dtypes"].items():
            if one == NOT_MEASURED:
                lines.append(f"| {family} | {dtype} |" + f" {NOT_MEASURED} |" * (len(head) - 2))
                continue
            phases = [
                f"{one['seconds'][phase]:.2f} s, {one['overhead'][phase]['median']:.2f}, {one['mfu'][phase]:.0%}, "
                f"{held['peak'] / 1e9:.2f} / {held['predicted'] / 1e9:.2f} GB"
                for phase, held in one["memory"].items()
            ]
            drifted = f"{one['ratio_drift']:.1e} / {one['clip_range']:.0e}"
            cells = [family, f"{dtype}, {one['computed_in']}", drifted, *phases, _compiled(one.get("compile"))]
            lines.append(f"| {' | '.join(cells)} |")
    for family, report in reports.items():
        lines.append(f"\n{family}, commands: {report['commands']}")
        lines += [f"{family}, {name} failed: {reason}" for name, reason in report["failed"].items()]
        lines += [f"{family}, {name}: left out, no time" for name in report["left_out"]]
    return "\n".join(lines)


def _compiled(found: Any) -> str:
    if not isinstance(found, dict):
        return "" if found is None else found
    even = "never" if found["break_even_epoch"] is None else f"epoch {found['break_even_epoch']:.0f}"
    return f"x{found['epoch_gain']:.2f}, warm-up {found['warm_up_seconds']:.0f} s, pays from {even}"
