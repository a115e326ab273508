"""What `tdpo train` was asked for, settled without torch: the preset, whether a run continues, what a dry run prints."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdpo_cli import rewards
from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.config.settings import RESUMABLE
from tdpo_cli.console import Console, duration, significant, size
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import launch
from tdpo_cli.sandbox import is_embedded
from tdpo_cli.storage.run_dir import RunDir

if TYPE_CHECKING:
    from tdpo_cli.machine import memory
    from tdpo_cli.models import FamilyEntry


def resolve(
    preset: str | None, overrides: list[tuple[str, Any]], out: Path | None, resume: bool, trust_rewards: bool, quiet: bool
) -> tuple[presets.Preset, bool]:
    """The preset with every setting known, and whether a run continues. Raises RequestError."""
    # one and the same command serves the first start, which nothing has come of yet, and every restart
    resume = resume and not ((preset is not None or launch.restarted()) and not RunDir(out).holds_a_run)
    if not trust_rewards and (resume or Path(preset or "").suffix == ".json"):
        recorded = RunDir(out).read_preset() if resume else presets.load(preset)
        rewards.check_trusted(recorded.rewards, presets.custom_rewards(preset, overrides), str(out / "preset.json") if resume else str(preset))
    if resume:
        resolved = _resumed(out, preset, overrides)
    else:
        resolved = presets.load("quickstart" if preset is None else preset, overrides)
        _check(resolved)
        unused = presets.without_effect(resolved)
        if unused and launch.is_main():
            Console(quiet=quiet).warn(f"ignored with {resolved.algorithm.name}, on which they do not act: {', '.join(unused)}.")
    return resolved, resume


def _check(preset: presets.Preset) -> None:
    """Whether all that a new run names is known, and its prompt files are there. Without torch. Raises RequestError."""
    from tdpo_cli import models
    from tdpo_cli.train import trackers

    models.check_source(models.resolve(preset.model.base))
    if preset.model.start_from is not None and not Path(preset.model.start_from).exists():
        raise RequestError(f"{preset.model.start_from}: no such file or folder to start from. Give a LoRA file or folder, a checkpoint or a run.")
    for name in preset.rewards:
        place = Path(name.rpartition(":")[0]).expanduser()
        if place.suffix == ".py" and not place.is_file():
            raise RequestError(f"custom reward {name!r}: there is no file {place.absolute()}")
    for name in (*preset.rewards, *preset.reward.checkpoints):
        rewards.check_name(name)
    for source in filter(None, (preset.rollout.prompts, preset.rollout.eval_prompts)):
        prompts.check(source)
    trackers.check(preset.run.trackers)


def _resumed(out: Path, preset: str | None, overrides: list[tuple[str, Any]]) -> presets.Preset:
    """The recorded preset with what was given explicitly; only RESUMABLE keys may differ. Raises RequestError."""
    recorded = RunDir(out).read_preset()
    wanted = presets.own_values(presets.load(preset, overrides), recorded) if preset else presets.override(recorded, overrides)
    differences = [
        f"  {key}: the run has {json.dumps(old)}, asked for {json.dumps(new)}"
        for key, old, new in presets.differences(recorded, wanted)
        if key not in RESUMABLE
    ]
    if differences:
        raise RequestError(f"{out}: a resumed run keeps its preset (only {', '.join(RESUMABLE)} may change):\n" + "\n".join(differences))
    return wanted


def _noise(preset: presets.Preset) -> str:
    rollout = preset.rollout
    if rollout.eta is not None:
        return f"DDIM, eta {rollout.eta:g}, in all {rollout.steps} steps"
    how = f"{rollout.dynamics}, noise level {rollout.noise_level:g}"
    if rollout.window is not None:
        return f"{how}, in {preset.stochastic_steps} of {rollout.steps} steps, drawn every epoch"
    if rollout.dynamics == "cps":
        return f"{how}; at most {preset.stochastic_steps} of {rollout.steps} steps are trained, counted once the model is loaded"
    return f"{how}, in {preset.stochastic_steps} of {rollout.steps} steps"


STATED_RATE = 2e14  # operations a second: a fifth of what an H100 is sold with in half precision, without sparsity


def _computation(flops: float, embedded: bool) -> str:
    if embedded:  # its networks are too small for any stated rate
        return f"{significant(flops / 1e12, 3)} TFLOP an epoch"
    return f"{significant(flops / 1e15, 3)} PFLOP an epoch; {duration(flops / STATED_RATE)} at {STATED_RATE / 1e12:.0f} TFLOP/s"


def dry_run(preset: presets.Preset, as_json: bool) -> None:
    from tdpo_cli.machine import footprint, memory
    from tdpo_cli.machine.networks import guessed
    from tdpo_cli.models import settings

    entry = settings.local_entry(preset)
    if entry is not None:
        preset = settings.fit(preset, entry)
    # which device there is, nobody has asked: the usual plan of a GPU, or the one that the limit allows
    gpu = not is_embedded(preset.model.base)
    limit = memory.limit(preset, memory.main_memory()[1] if not gpu else None, gpu) if preset.run.memory_limit else None
    plan = memory.choose(preset, limit, gpu=gpu) if limit is not None else memory.USUAL
    shares = {
        count: {
            "samples": -(-preset.rollout.samples_per_epoch // count),
            "samples_per_optimizer_step": -(-preset.update.batch_size // count),
            "peak_memory_bytes": memory.estimate(preset, count, plan, gpu),
        }
        for count in (1, 8)
    }
    facts = {
        "preset": preset.as_dict(),
        "samples_per_epoch": preset.rollout.samples_per_epoch,
        "effective_batch": preset.update.batch_size,
        "updates_per_epoch": preset.updates_per_epoch,
        "reward_queries": preset.reward_queries,
        "plan": plan.as_dict(),
        "peak_memory_bytes": memory.estimate(preset, plan=plan, gpu=gpu),
        "flops_per_epoch": footprint.epoch_flops(preset),
        "per_device": shares,
        "cards": memory.cards(preset) if gpu else {},
    }
    unknown = guessed(preset)
    if unknown:  # no number is better than one of another model
        facts |= {"peak_memory_bytes": None, "flops_per_epoch": None, "cards": {}}
        for share in shares.values():
            share["peak_memory_bytes"] = None
    if as_json:
        return print(json.dumps(facts))
    console = Console()
    console.pairs(_wrapped(_rows(preset, entry, plan, facts)), title="dry run: nothing is written")
    console.say("  Memory and computation are predictions. The plan is chosen from free")
    console.say("  memory and never changes the result.")


def _rows(preset: presets.Preset, entry: FamilyEntry | None, plan: memory.Plan, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a dry run prints of `facts`."""
    from tdpo_cli.machine.memory import card_lines

    flops = facts["flops_per_epoch"]
    share = "{samples} samples, {samples_per_optimizer_step} per optimizer step, {memory}"
    about = lambda count: "memory unknown" if count is None else f"about {size(count)}"
    shown = {count: share.format(**numbers, memory=about(numbers["peak_memory_bytes"])) for count, numbers in facts["per_device"].items()}
    return [
        ("model", preset.model.base),
        ("family", entry.title if entry else "unknown until downloaded"),
        ("noise", _noise(preset) if entry else "checked against the family once it is downloaded"),
        ("algorithm", preset.algorithm.name),
        ("rewards", f"{preset.trained_words} trains; watching {', '.join(preset.reward.watch) or 'none'}"),
        *([("constraints", preset.constraints_words)] if preset.reward.at_least else []),
        ("prompts", f"{preset.rollout.prompts}; held out: {preset.rollout.eval_prompts or 'none'}"),
        ("samples per epoch", str(preset.rollout.samples_per_epoch)),
        ("effective batch", str(preset.update.batch_size)),
        ("optimizer steps", f"{preset.updates_per_epoch} per epoch, {preset.updates_per_epoch * preset.run.epochs:,} in all"),
        ("reward queries", f"{preset.reward_queries:,}"),
        ("on 1 device", shown[1]),
        ("on each of 8", shown[8]),
        ("computation", "unknown until downloaded" if flops is None else _computation(flops, is_embedded(preset.model.base))),
        ("plan", str(plan)),
        *card_lines(facts["cards"]),
    ]


def _wrapped(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of two columns within 80 characters."""
    width = 76 - max(len(name) for name, _ in rows)
    lines = [(name, textwrap.wrap(value, width, break_long_words=False) or [""]) for name, value in rows]
    return [("" if number else name, line) for name, parts in lines for number, line in enumerate(parts)]
