"""Time an epoch against a stand-in of the official loop, in the same process, on the same weights, prompts and noise.

    python benchmarks/epoch.py --device cpu --size tiny --json
    python benchmarks/epoch.py --device cuda --size sd1|sdxl|sd35    # one command, under ten minutes, for everything a GPU can show
    python benchmarks/epoch.py --device cpu --size tiny --parts whole # the same code on tiny pipelines of the three families

The stand-in is of Stable Diffusion 1.x alone. Its equality gate comes first: the same number of optimizer steps, a gradient and a
ratio_drift no worse than the stand-in's. If it does not hold, no time is taken and the exit status is 1.

The part `whole` (benchmarks/whole.py) takes a family at its full architecture with random weights: fp16 and bf16, drift, phases against
their bare calls, share of the matrix-product rate, memory against the plan, torch.compile, and the commands train, resume, sample, score.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import gate  # noqa: E402
import ladder  # noqa: E402
import matmul  # noqa: E402
import ours  # noqa: E402
import standin  # noqa: E402
import torch  # noqa: E402
import whole  # noqa: E402
from setup import SIZES, Bench, build  # noqa: E402
from timing import CLOCKS, Stopwatch, clock_of, interleave, ratios, seconds, spread  # noqa: E402
from torch import Tensor  # noqa: E402

from tdpo_cli.machine import memory  # noqa: E402
from tdpo_cli.machine.networks import networks  # noqa: E402
from tdpo_cli.train.metrics import peak_memory  # noqa: E402


def measure(
    bench: Bench, rounds: int, with_ladder: bool, with_compile: bool, tamper: Callable[[Tensor], Tensor] = lambda gradient: gradient
) -> dict[str, Any]:
    """The benchmark's one object. `gate.holds` says whether the times are there."""
    plan, official = _plan(bench), standin.OFFICIAL
    report = _facts(bench, plan, rounds)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    ladder.our_epoch(bench, plan)  # ours first: on a CPU the peak is the process', and only grows
    report["peak_memory_bytes"] = peak_memory(bench.device)
    held = _gate(bench, plan, official, tamper)
    report |= {"gate": held.as_dict(), "ratio_drift": held.ratio_drift, "standin_ratio_drift": held.standin_ratio_drift}
    if not held.holds:
        return report

    bare = ours.Bare(bench, plan)
    four = dataclasses.replace(official, micro_batch=4)
    timed = interleave({
        "standin": lambda: ladder.standin_epoch(bench, official), "ours": lambda: ladder.our_epoch(bench, plan),
        "bare": lambda: _bare(bench, bare), "standin at micro-batch 4": lambda: ladder.standin_epoch(bench, four),
    }, rounds)  # fmt: skip
    report |= {"clock": CLOCKS[clock_of(bench)], "spreads": {}}
    main_clock = clock_of(bench)
    for clock, suffix in ((main_clock, ""), (1 - main_clock, f"_{CLOCKS[1 - main_clock]}")):
        for phase in ("training", "sampling", "epoch"):
            report["spreads"][f"{phase}_ratio{suffix}"] = spread(ratios(timed["standin"], timed["ours"], phase, clock))
            report["spreads"][f"{phase}_ratio_of_micro_batch_4{suffix}"] = spread(
                ratios(timed["standin at micro-batch 4"], timed["ours"], phase, clock)
            )
        report["spreads"][f"overhead{suffix}"] = spread(ratios(timed["ours"], timed["bare"], "epoch", clock))
    report |= {name: values["median"] for name, values in report["spreads"].items()}
    report["seconds"] = {
        name: {phase: spread(seconds(rows, phase, main_clock))["median"] for phase in [*rows[0], "epoch"]} for name, rows in timed.items()
    }
    report["matmul"] = matmul.shares(bench, bare, timed["bare"])
    if with_ladder:
        report["ladder"] = ladder.climb(bench, plan, rounds)
    if with_compile:
        report["compile"] = ladder.compiled(bench, plan, rounds)
    return report


def _plan(bench: Bench) -> memory.Plan:
    if bench.device.type != "cuda":
        return memory.CPU_LADDER[0]
    plan = memory.choose(bench.preset, int(memory.MARGIN * torch.cuda.mem_get_info(bench.device)[0]))
    return dataclasses.replace(plan, micro_batch=min(plan.micro_batch, bench.size.batch), sample_batch=min(plan.sample_batch, bench.size.samples))


def _gate(bench: Bench, plan: memory.Plan, official: standin.Ways, tamper: Callable[[Tensor], Tensor]) -> gate.Gate:
    """Each loop trains on its own samples; they come from the same noise."""
    bench.restart()
    own = ours.sample(bench, plan)
    credit, order = ours.credit(bench, own, ours.score(bench, own)), ours.order(bench)
    reference = gate.reference_gradient(bench, own, credit, order)
    mine = ours.train(bench, plan, own, credit, order)
    bench.restart()
    theirs = standin.train(bench, official, standin.sample(bench, official), credit, order, tamper)
    bench.restart()
    return gate.compare(bench, mine, theirs, reference)


def _bare(bench: Bench, bare: ours.Bare) -> dict[str, tuple[float, float]]:
    watch = Stopwatch(bench.synchronize)
    bench.restart()
    for name in ("denoise", "decode", "encode", "train"):
        with watch(name):
            getattr(bare, name)()
    return watch.phases


def _facts(bench: Bench, plan: memory.Plan, rounds: int) -> dict[str, Any]:
    import diffusers
    import transformers

    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    sizes = dataclasses.asdict(bench.size) | {
        "latent_shape": list(bench.policy.latent_shape), "unet_parameters": sum(p.numel() for p in bench.policy.family.network.parameters()),
        "guidance_scale": bench.preset.rollout.guidance_scale, "updates_per_epoch": bench.preset.updates_per_epoch, "plan": plan.as_dict(),
    }  # fmt: skip
    return {
        "device": name, "dtype": str(bench.policy.family.network.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "rounds": rounds,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}, "sizes": sizes,
    }  # fmt: skip


def dry(bench: Bench) -> dict[str, Any]:
    """What a construction without numbers tells: parameters, and the memory that every plan is predicted to need."""
    parameters = {type(network).__name__: sum(p.numel() for p in network.parameters()) for network in (*bench.networks, bench.encoder)}
    plans = {str(plan): memory.phases(bench.preset, 1, plan) for plan in memory.GPU_LADDER}
    nets = networks(bench.preset)
    stored = 4 * nets.latent_elements + 4 * bench.encoder.embed_dim
    return {
        "parameters": parameters,
        "predicted_bytes": plans,
        "trajectory_bytes_per_step_and_sample": stored,
        "sizes": dataclasses.asdict(bench.size),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=[*SIZES, *(family for family in whole.FULL if family not in SIZES)], default="tiny")
    parser.add_argument("--parts", help="standin, whole or both with a comma [default: on a CPU the stand-in; on a GPU both where there is one]")
    parser.add_argument("--family", action="append", choices=list(whole.FULL), help="of the tiny pipelines only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section of `whole` begins later; the report names what was left out")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16", help="of sd1's networks beside the stand-in on a GPU")
    parser.add_argument("--rounds", type=int, help="paired runs; medians are of these [default: 5; on a GPU 2]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ladder", action="store_true", help="one line per gain")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside the stand-in too, with its warm-up")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of `whole`")
    parser.add_argument("--dry", action="store_true", help="construct without numbers and print sizes and predictions")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    parts = options.parts.split(",") if options.parts else _usual_parts(options.device, options.size)
    if unknown := set(parts) - {"standin", "whole"}:
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; expected standin, whole")
    if "standin" in parts and options.size not in SIZES:
        parser.error(f"--size {options.size}: there is no stand-in of it; use --parts whole")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.device == "cuda" and not torch.cuda.is_available() and not options.dry:
        parser.error("--device cuda: there is no CUDA device here")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if options.dry:
        print(json.dumps(dry(build(SIZES[options.size], torch.device("meta"), options.dtype)), indent=None if options.json else 2))
        return 0
    torch.set_num_threads(options.threads)
    report, status = {}, 0
    if "standin" in parts:
        report, status = _beside_standin(options)
    if "whole" in parts:
        report["whole"] = _whole(options)
        status = max(status, *(int(bool(one["failed"])) for one in report["whole"].values()))
    if options.json:
        print(json.dumps(report))
    elif "whole" in parts:
        print(whole.table(report["whole"]))
    return status


def _usual_parts(device: str, size: str) -> list[str]:
    return [part for part, wanted in (("standin", size in SIZES), ("whole", device == "cuda" or size not in SIZES)) if wanted]


def _beside_standin(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The report, and the exit status."""
    gpu, size = options.device == "cuda", SIZES[options.size]
    if gpu:  # growth is linear in both, so the ratios are those of the published numbers, in a sixth of the time
        size = dataclasses.replace(size, samples=min(size.samples, 16), steps=min(size.steps, 16), batch=min(size.batch, 8))
    bench = build(size, torch.device(options.device), options.dtype)
    torch.set_num_threads(options.threads)
    report = measure(bench, options.rounds or (2 if gpu else 5), options.ladder, options.compile)
    if not options.json:
        _say(report)
    for reason in report["gate"]["reasons"]:
        print(f"the equality gate does not hold: {reason}", file=sys.stderr)
    return report, 0 if report["gate"]["holds"] else 1


def _whole(options: argparse.Namespace) -> dict[str, Any]:
    """A full family, or all of them as tiny pipelines; the minutes are shared among these."""
    full = options.size in whole.FULL
    families, report = [options.size] if full else options.family or list(whole.FULL), {}
    for family in families:
        amount = whole.FULL[family] if full else whole.TINY
        amount = dataclasses.replace(amount, rounds=options.rounds or amount.rounds)
        with tempfile.TemporaryDirectory() as folder:
            where = family, torch.device(options.device), Path(folder)
            report[family] = whole.measure(*where, full, amount, not options.no_compile, options.minutes / len(families))
        whole.release(torch.device(options.device))
    return report


def _say(report: dict[str, Any]) -> None:
    print(f"{report['sizes']['name']} on {report['device']}, {report['threads']} thread(s), {report['rounds']} paired rounds")
    print(f"  by {report.get('clock', 'no clock')}, medians of paired rounds; stand-in / tdpo; (least to most)")
    for name, values in report.get("spreads", {}).items():
        print(f"  {name:<44} {values['median']:6.2f}   ({values['least']:.2f} to {values['most']:.2f})")
    for row in report.get("ladder", []):
        gains = "  ".join(f"{phase} x{row[f'{phase}_gain']:.2f}" for phase in ("sampling", "training", "epoch") if f"{phase}_gain" in row)
        print(f"  {row['rung']:<52} {row['epoch_seconds']:8.2f} s  {gains}")
    for name in ("ratio_drift", "standin_ratio_drift", "peak_memory_bytes", "gate", "matmul", "compile"):
        if name in report:
            print(f"  {name}: {report[name]}")


if __name__ == "__main__":
    sys.exit(main())
