"""CPU time of a command's imports, each module's own and with what it imports first, by `-X importtime`.

python benchmarks/start.py
python benchmarks/start.py --imports tdpo_cli.score.score --top 10

The floor is what a command cannot do without: torch, and for training and sampling the classes of one pipeline, which import all the rest.
Modules beyond it are counted too: their number does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PIPELINE = (
    "import torch; from transformers import CLIPTextModel, CLIPTokenizer; "
    "from diffusers import StableDiffusionPipeline, AutoencoderKL, UNet2DConditionModel, DDIMScheduler, FlowMatchEulerDiscreteScheduler"
)
TORCH = "import torch; import numpy; from PIL import Image"
COMMANDS = {"tdpo_cli.train.train": PIPELINE, "tdpo_cli.sampling.sample": PIPELINE, "tdpo_cli.score.score": TORCH}  # -> the floor


def rows(report: str) -> list[tuple[str, int, int, int]]:
    """(module, depth, own, cumulative) in microseconds of wall time, of the lines of -X importtime."""
    found = []
    for line in report.splitlines():
        if not line.startswith("import time:") or "self [us]" in line:
            continue
        own, cumulative, name = line.removeprefix("import time:").split("|")
        found.append((name.strip(), (len(name) - len(name.lstrip()) - 1) // 2, int(own), int(cumulative)))
    return found


def by_library(found: Sequence[tuple[str, int, int, int]]) -> dict[str, int]:
    """Microseconds of all modules of a library, each module's own, the largest first."""
    sums: dict[str, int] = {}
    for name, _, own, _ in found:
        library = name.partition(".")[0]
        sums[library] = sums.get(library, 0) + own
    return dict(sorted(sums.items(), key=lambda one: -one[1]))


def beyond(found: Sequence[tuple[str, int, int, int]], floor: Sequence[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    """The rows of modules that the floor does not import."""
    known = {name for name, *_ in floor}
    return [row for row in found if row[0] not in known]


def measure(code: str) -> tuple[float, list[tuple[str, int, int, int]]]:
    """CPU seconds of a process that only runs this code; and its rows."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    before = os.times()
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, rows(run.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imports", action="append", metavar="MODULE", help=f"[default: {', '.join(COMMANDS)}]")
    parser.add_argument("--top", type=int, default=5, help="libraries shown")
    options = parser.parse_args()
    floors = {code: measure(code) for code in sorted({COMMANDS.get(module, PIPELINE) for module in options.imports or COMMANDS})}
    for module in options.imports or COMMANDS:
        floor_seconds, floor = floors[COMMANDS.get(module, PIPELINE)]
        seconds, found = measure(f"import {module}")
        total, more = sum(own for _, _, own, _ in found), beyond(found, floor)
        share = sum(own for _, _, own, _ in more) / total
        print(f"{module}: {seconds:.2f} CPU seconds, {len(found)} modules")
        print(f"  the floor {floor_seconds:.2f} CPU seconds, {len(floor)} modules; beyond it {len(more)} modules, {share:.1%}")
        for library, own in list(by_library(found).items())[: options.top]:
            print(f"  {library:<24} {own / total:6.1%}  {1e3 * seconds * own / total:7.0f} CPU ms")


if __name__ == "__main__":
    main()
