"""Train the sandbox's models from scratch: `python -m tdpo_cli.sandbox.build [PART ...]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

from tdpo_cli.sandbox import ZOO

PARTS = ("clip", "vae", "unet", "aesthetic", "pickscore", "hpsv2", "imagereward", "flow")  # each needs only those before it
FOLDERS = {
    "clip": ("aesthetic/model.safetensors", "pipeline/text_encoder", "pipeline/tokenizer"),
    "vae": ("pipeline/vae",),
    "unet": ("pipeline/unet",),
    "aesthetic": ("aesthetic/sac+logos+ava1-l14-linearMSE.pth",),
    "pickscore": ("pickscore",),
    "hpsv2": ("hpsv2",),
    "imagereward": ("imagereward",),
    "flow": ("flow",),
}


def main() -> None:
    arguments = read_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
    quiet_libraries()
    if arguments.check:
        from tdpo_cli.sandbox.training.unet import check

        print(json.dumps(check(arguments.out, arguments.samples, arguments.seed), indent=2))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    reports = {part: build(part, arguments.out, arguments.seed) for part in arguments.parts}
    print_report(reports, arguments.out)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdpo_cli.sandbox.build", description="Train the sandbox's models.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder of the weights (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="train nothing; let gold judge samples of the pipeline")
    parser.add_argument("--samples", type=int, default=256, help="how many, with --check")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    arguments.parts = [part for part in PARTS if part in arguments.parts or not arguments.parts]
    return arguments


def quiet_libraries() -> None:
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)  # networks this small lose more by waiting for threads than they gain
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def build(part: str, zoo: Path, seed: int) -> dict:
    """Train one part and enter its figures in build.json."""
    wall, cpu = time.perf_counter(), time.process_time()
    module = importlib.import_module(f"tdpo_cli.sandbox.training.{part}")
    figures = getattr(module, f"build_{part}")(zoo, seed)
    report = {
        "seed": seed,
        "cpu_seconds": round(time.process_time() - cpu),
        "wall_seconds": round(time.perf_counter() - wall),
        "bytes": sum(size_of(zoo / name) for name in FOLDERS[part]),
        "figures": figures,
    }
    ledger = zoo / "build.json"
    known = json.loads(ledger.read_text()) if ledger.exists() else {}
    known[part] = report
    ledger.write_text(json.dumps({name: known[name] for name in PARTS if name in known}, indent=2) + "\n")
    return report


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def print_report(reports: dict[str, dict], zoo: Path) -> None:
    print()
    for part, report in reports.items():
        megabytes = report["bytes"] / 1e6
        print(f"{part:12s} {report['cpu_seconds']:5d} CPU-s  {megabytes:5.2f} MB  {json.dumps(report['figures'])}")
    total = sum(report["cpu_seconds"] for report in reports.values())
    print(f"{'together':12s} {total:5d} CPU-s  {size_of(zoo) / 1e6:5.2f} MB in {zoo}")


if __name__ == "__main__":
    main()
