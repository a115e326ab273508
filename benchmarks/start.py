"""CPU time of a command's imports, each module's own and with what it imports first, by `-X importtime`.

python benchmarks/start.py
python benchmarks/start.py --imports tdpo_cli.score.score --top 10
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("tdpo_cli.train.train", "tdpo_cli.sampling.sample", "tdpo_cli.score.score")


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


def measure(module: str) -> tuple[float, list[tuple[str, int, int, int]]]:
    """CPU seconds of a process that only imports the module; and its rows."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    before = os.times()
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {module}"], env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, rows(run.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imports", action="append", metavar="MODULE", help=f"[default: {', '.join(COMMANDS)}]")
    parser.add_argument("--top", type=int, default=5, help="libraries shown")
    options = parser.parse_args()
    for module in options.imports or COMMANDS:
        seconds, found = measure(module)
        total = sum(own for _, _, own, _ in found)
        print(f"{module}: {seconds:.2f} CPU seconds, {len(found)} modules")
        for library, own in list(by_library(found).items())[: options.top]:
            print(f"  {library:<24} {own / total:6.1%}  {1e3 * seconds * own / total:7.0f} CPU ms")


if __name__ == "__main__":
    main()
