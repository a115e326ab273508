"""The command line: thin commands, heavy imports inside each."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tdpo_cli import __version__, launch
from tdpo_cli import preset as presets
from tdpo_cli.console import Console, size
from tdpo_cli.errors import RequestError, WorkError

app = typer.Typer(
    name="tdpo",
    help="Fine-tune text-to-image diffusion models against reward models with TDPO and TDPO-R, and see when the reward is being over-optimised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
SetOption = Annotated[Optional[list[str]], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated.")]
CheckpointOption = Annotated[
    Optional[list[str]], typer.Option("--checkpoint", metavar="REWARD=PATH", help="Where a reward's checkpoint is; may be repeated.")
]
GpusOption = Annotated[Optional[int], typer.Option(min=1, metavar="N", help="One worker on each of N GPUs. The result stays the same.")]
ProcessesOption = Annotated[Optional[int], typer.Option(min=1, metavar="N", help="N workers on the CPU. The result stays the same.")]
ZooOption = Annotated[Optional[str], typer.Option("--zoo", metavar="sandbox", help="Take reward checkpoints from the embedded set.")]


def main() -> None:
    """Run the command line with the exit status of the contract: 0 done, 1 the work failed, 2 the request was wrong."""
    signal.signal(signal.SIGTERM, _terminated)
    launch.end_with_launcher()
    try:
        status = app(standalone_mode=False)
        code = status if isinstance(status, int) else 0
        if code in (130, 143):  # the parser's own answer to Ctrl-C; workers that were stopped
            _stopped(code)
    except KeyboardInterrupt:
        code = _stopped(130)
    except _Terminated:
        code = _stopped(143)
    except RequestError as error:
        code = _failed(error, 2)
    except WorkError as error:
        code = _failed(error, 1)
    except Exception as error:  # noqa: BLE001 - what typer's own parser raises has a message and an exit status
        if not hasattr(error, "format_message"):
            if launch.last_words(error, traceback.format_exc()):
                raise SystemExit(1) from None
            raise
        code = _failed(error.format_message(), getattr(error, "exit_code", 2))
    sys.stdout.flush()
    raise SystemExit(code)


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminated(signum: int, frame: Any) -> None:
    raise _Terminated


def _stopped(code: int) -> int:
    if launch.last_words(None, "stopped."):
        return code  # the launcher says it once
    training = "train" in sys.argv[1:2]
    how = "Finished epochs are on disk; continue with tdpo train --resume --out RUN." if training else "What was finished is on disk."
    print(f"\ntdpo: stopped. {how}", file=sys.stderr)
    return code


def _failed(message: object, code: int) -> int:
    if not launch.last_words(message if isinstance(message, BaseException) else None, str(message)):
        print(f"tdpo: {message}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"tdpo {__version__}")
        raise typer.Exit


# --- train ------------------------------------------------------------------------------------------------------------------
@app.command()
def train(
    preset: Annotated[Optional[str], typer.Option(metavar="NAME|FILE.toml", help="What to run [default: quickstart].")] = None,
    set_: SetOption = None,
    algorithm: Annotated[Optional[str], typer.Option(metavar="ddpo|tdpo|tdpo-r", help="Same as --set algorithm.name=...")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Same as --set run.seed=...")] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Same as --set run.epochs=...")] = None,
    out: Annotated[Optional[Path], typer.Option(help="The run folder [default: a new runs/PRESET-0001, counting up].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    machines: Annotated[int, typer.Option(min=1, metavar="M", help="The same command is started on M machines.")] = 1,
    machine_rank: Annotated[Optional[int], typer.Option(min=0, metavar="R", help="Which of them this is; 0 writes the run folder.")] = None,
    main_address: Annotated[Optional[str], typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached.")] = None,
    checkpoint: CheckpointOption = None,
    zoo: ZooOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a policy as a preset says."""
    overrides = _overrides(set_, checkpoint, zoo)
    overrides += [(key, value) for key, value in (("algorithm.name", algorithm), ("run.seed", seed), ("run.epochs", epochs)) if value is not None]
    if resume:
        resolved, out = _resumed(out, preset, overrides), Path(out or ".")
    else:
        resolved = presets.load(preset or "quickstart", overrides)
    if dry_run:
        return _dry_run(resolved, json_)
    workers = launch.plan(gpus, processes, machines, machine_rank, main_address)
    if machines > 1 and out is None:
        raise RequestError("--machines needs --out RUN, the same on every machine.")
    if out is None:
        from tdpo_cli.run_dir import next_free

        out = next_free(Path("runs"), Path(preset or "quickstart").stem)
    if launch.is_worker():
        if gpus or processes:
            launch.check_world(workers)
    else:
        launch.check(workers, resolved.rollout.samples_per_epoch)
        if workers.world_size > 1:
            raise typer.Exit(launch.run(workers, [*sys.argv[1:], "--out", str(out)]))
    console = Console(quiet or json_, silent=not launch.is_main())
    with console.working("loading libraries"):
        _prepare_libraries()
        from tdpo_cli import train as training

    report = training.run(resolved, out, resume, console, "cuda" if gpus else "cpu" if processes else None)
    if json_ and launch.is_main():
        print(json.dumps(report))


def _overrides(set_: list[str] | None, checkpoint: list[str] | None, zoo: str | None) -> list[tuple[str, Any]]:
    overrides = [presets.parse_override(text) for text in set_ or []]
    overrides += [(f"reward.checkpoints.{name}", path) for name, path in _checkpoints(checkpoint).items()]
    if zoo is not None:
        overrides.append(("reward.zoo", zoo))
    return overrides


def _checkpoints(given: list[str] | None) -> dict[str, str]:
    """REWARD=PATH, each -> reward name -> path. Raises RequestError."""
    paths = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise RequestError(f"--checkpoint {text}: expected REWARD=PATH.")
        paths[name] = path
    return paths


RESUMABLE = ("run.epochs", "run.save_every", "run.keep_last")  # what may change when a run goes on


def _resumed(out: Path | None, preset: str | None, overrides: list[tuple[str, Any]]) -> presets.Preset:
    """The recorded preset with what was given explicitly; only RESUMABLE keys may differ. Raises RequestError."""
    from tdpo_cli.run_dir import RunDir

    if out is None:
        raise RequestError("--resume needs --out RUN: the folder of the run to continue.")
    recorded = RunDir(out).read_preset()
    wanted = presets.load(preset, overrides) if preset else presets.override(recorded, overrides)
    differences = [
        f"  {key}: the run has {json.dumps(old)}, asked for {json.dumps(new)}"
        for key, old, new in presets.differences(recorded, wanted)
        if key not in RESUMABLE
    ]
    if differences:
        raise RequestError(f"{out}: a resumed run keeps its preset (only {', '.join(RESUMABLE)} may change):\n" + "\n".join(differences))
    return wanted


def _dry_run(preset: presets.Preset, as_json: bool) -> None:
    from tdpo_cli import memory

    shares = {
        count: {
            "samples": -(-preset.rollout.samples_per_epoch // count),
            "samples_per_optimizer_step": -(-preset.update.batch_size // count),
            "peak_memory_bytes": memory.estimate(preset, count),
        }
        for count in (1, 8)
    }
    facts = {
        "preset": preset.as_dict(),
        "samples_per_epoch": preset.rollout.samples_per_epoch,
        "effective_batch": preset.update.batch_size,
        "updates_per_epoch": preset.updates_per_epoch,
        "reward_queries": preset.reward_queries,
        "peak_memory_bytes": memory.estimate(preset),
        "per_device": shares,
    }
    if as_json:
        return print(json.dumps(facts))
    share = "{samples} samples an epoch, {samples_per_optimizer_step} of each optimizer step, about {memory} of memory"
    shown = {count: share.format(**numbers, memory=size(numbers["peak_memory_bytes"])) for count, numbers in shares.items()}
    Console().pairs(
        [
            ("model", preset.model.base),
            ("algorithm", preset.algorithm.name),
            ("rewards", f"{preset.reward.train} trains; watching {', '.join(preset.reward.watch) or 'none'}"),
            ("prompts", f"{preset.rollout.prompts}; held out: {preset.rollout.eval_prompts or 'none'}"),
            ("samples per epoch", str(preset.rollout.samples_per_epoch)),
            ("effective batch", str(preset.update.batch_size)),
            ("optimizer steps", f"{preset.updates_per_epoch} per epoch, {preset.updates_per_epoch * preset.run.epochs:,} in all"),
            ("reward queries", f"{preset.reward_queries:,}"),
            ("on 1 device", shown[1]),
            ("on each of 8", shown[8]),
            ("memory", "an estimate, at micro-batch 4; the micro-batch is chosen from free memory and never changes the result"),
        ],
        title="dry run: nothing is written",
    )


# --- sample -----------------------------------------------------------------------------------------------------------------
@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a run folder, LoRA weights, `base`, a diffusers folder or hub id.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPTS...", help="Strings, a text file with one prompt a line, or - for standard input.")],
    preset: Annotated[Optional[str], typer.Option(metavar="NAME|FILE.toml", help="Base model and sampling settings [default: the run's own].")] = None,
    set_: SetOption = None,
    epoch: Annotated[Optional[int], typer.Option(help="Of a run folder: which checkpoint [default: the last].")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the images [default: a new samples/NAME-0001].")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images, whatever the batch size.")] = 0,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images per network call [default: from memory].")] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, max=1000, help="Denoising steps [default: the preset's].")] = None,
    guidance_scale: Annotated[Optional[float], typer.Option(min=0, help="[default: the preset's]")] = None,
    eta: Annotated[Optional[float], typer.Option(min=0, max=1, help="DDIM noise, 0 is deterministic [default: the preset's].")] = None,
    negative_prompt: Annotated[Optional[str], typer.Option(help="[default: the preset's]")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA; 0 is the base model.")] = 1.0,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU where there is one]")] = None,
    dtype: Annotated[Optional[str], typer.Option(metavar="fp32|fp16|bf16", help="[default: the preset's]")] = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Sample images from a checkpoint."""
    from tdpo_cli import prompts as prompt_sources

    workers = launch.plan(gpus, processes, 1, None, None)
    if workers.world_size > 1 and "-" in prompts:
        raise RequestError("prompts from standard input reach one process only: give a text file with --gpus or --processes.")
    wanted = prompt_sources.from_arguments(prompts)
    if launch.is_worker():
        launch.check_world(workers)
    elif workers.world_size > 1:
        from tdpo_cli.run_dir import next_free

        launch.check(workers, len(wanted) * per_prompt)
        out = out or next_free(Path("samples"), Path(checkpoint).name or "base")
        raise typer.Exit(launch.run(workers, [*sys.argv[1:], "--out", str(out)]))
    _prepare_libraries()
    from tdpo_cli import sample as sampling

    overrides = [presets.parse_override(text) for text in set_ or []]
    given = {
        "rollout.steps": steps, "rollout.guidance_scale": guidance_scale, "rollout.negative_prompt": negative_prompt, "model.dtype": dtype,
    }  # fmt: skip
    overrides += [(key, value) for key, value in given.items() if value is not None]
    report = sampling.run(
        checkpoint, wanted, preset, overrides, epoch, out, per_prompt, seed, batch_size, eta, lora_scale,
        device or ("cuda" if gpus else "cpu" if processes else None), Console(quiet or json_, silent=not launch.is_main()),
    )  # fmt: skip
    if json_ and launch.is_main():
        print(json.dumps(report))


# --- score ------------------------------------------------------------------------------------------------------------------
@app.command()
def score(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Its images, also those in folders below.")],
    rewards: Annotated[str, typer.Option(metavar="all|A,B,...", help="all: aesthetic, pickscore, hpsv2, imagereward.")] = "all",
    prompts: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Prompts: .txt, one line per image in name order; .jsonl or .csv.")] = None,
    prompt: Annotated[Optional[str], typer.Option(metavar="TEXT", help="One prompt for all images.")] = None,
    variant: Annotated[str, typer.Option(metavar="tdpo|package", help="As the official TDPO, or as each reward's own package.")] = "tdpo",
    checkpoint: CheckpointOption = None,
    zoo: ZooOption = None,
    out: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="A .jsonl or .csv; one that exists is continued [default: a new scores/FOLDER-0001.jsonl].")
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images per network call [default: 8, on a GPU 64].")] = None,
    processes: Annotated[Optional[int], typer.Option(min=1, help="Share the work among CPU processes (or --device).")] = None,
    gpus: Annotated[Optional[int], typer.Option(min=1, help="Share the work among GPUs.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU where there is one]")] = None,
    dtype: Annotated[str, typer.Option(metavar="fp32|fp16|bf16", help="Other than fp32: prints how far scores are from it.")] = "fp32",
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Score the images of a folder with reward models."""
    _prepare_libraries()
    from tdpo_cli import score as scoring

    report = scoring.run(
        folder, rewards, prompt, prompts, variant, _checkpoints(checkpoint), zoo, out, batch_size, processes, gpus, device, dtype,
        Console(quiet or json_),
    )  # fmt: skip
    if json_:
        print(json.dumps(report))
    if failure := scoring.failure(report):
        raise WorkError(failure)


# --- presets ----------------------------------------------------------------------------------------------------------------
@app.command("presets")
def presets_(
    name: Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="Show this preset, every setting resolved.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its default and meaning.")] = False,
    json_: JsonFlag = False,
) -> None:
    """List the presets, or show one."""
    if keys:
        rows = [{"key": key, "type": kind, "default": default, "meaning": doc} for key, kind, default, doc in presets.describe()]
        if json_:
            return print(json.dumps(rows))
        width = max(len(row["key"]) for row in rows)
        for row in rows:
            print(f"{row['key']:<{width}}  {row['meaning']} [{row['type']}; default {json.dumps(row['default'])}]")
    elif name:
        resolved = presets.load(name)
        if json_:
            return print(json.dumps(resolved.as_dict()))
        print(presets.as_toml(resolved), end="")
    else:
        listed = {known: presets.load(known) for known in presets.names()}
        if json_:
            return print(json.dumps({known: preset.as_dict() for known, preset in listed.items()}))
        for known, preset in listed.items():
            print(f"{known:<12}  {preset.algorithm.name} on {preset.reward.train}, {preset.model.base}, {preset.run.epochs} epochs")


# --- doctor -----------------------------------------------------------------------------------------------------------------
@app.command()
def doctor(
    preset: Annotated[Optional[str], typer.Option(metavar="NAME|FILE.toml", help="Whether this could run here [default: quickstart].")] = None,
    json_: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show what this machine can run and which files are missing; exit status 1 if the preset could not run as things are."""
    _prepare_libraries()
    from tdpo_cli import doctor as examination

    report = examination.run(preset, Console(quiet or json_))
    if json_:
        print(json.dumps(report))
    if not report["ok"]:
        raise typer.Exit(1)


def _prepare_libraries() -> None:
    """Before torch and its friends are imported: waiting threads sleep, and only errors reach the screen."""
    # threads that spin while they wait make tiny models 30x slower on a busy machine; must be set before torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import logging
    import warnings

    for library in ("transformers", "diffusers", "bitsandbytes", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
