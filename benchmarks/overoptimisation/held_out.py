"""The methods' runs on held-out prompts: `tdpo cross-eval` on their run folders, and of its result what the table needs.

    python benchmarks/overoptimisation/held_out.py --work runs/overoptimisation

needs the run folders that run.py left; writes results/held_out.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import arms
from run import RESULTS, commit

from tdpo_cli.storage import disk

EPOCHS = (19, 39, 59)
PER_PROMPT = 4


def evaluate(work: Path, processes: int) -> dict[str, Any]:
    """-> the content of cross_eval.json; goes on where it was stopped."""
    out = work / "held-out"
    folders = [work / "main" / f"{arm}-seed{seed}" for arm in arms.METHODS for seed in arms.SEEDS]
    command = [sys.executable, "-m", "tdpo_cli", "cross-eval", *map(str, folders), "--out", str(out), "--per-prompt", str(PER_PROMPT)]
    for epoch in EPOCHS:
        command += ["--epoch", str(epoch)]
    subprocess.run([*command, "--processes", str(processes)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    return json.loads((out / "cross_eval.json").read_text())


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """Per run: what the sentence reads, the sentence, and gold."""
    models = {model["name"]: model for model in content["models"]}
    runs = []
    for run in content["runs"]:
        arm, _, seed = run["run"].rpartition("-seed")
        entries = [models[name] for name in run["models"]]
        runs.append({
            "arm": arm,
            "seed": int(seed),
            "verdict": run["verdict"],
            "since_base": run["since_base"],
            "agreement": entries[-1]["agreement"],
            "gold": [entry["rewards"]["gold"]["standardised"] for entry in entries],
            "gold_drop": run["peak_to_final"]["gold"],
        })  # fmt: skip
    return {
        "commit": commit(), "tdpo": content["tdpo"], "epochs": EPOCHS, "prompts": len(content["prompts"]), "per_prompt": content["per_prompt"],
        "seed": content["seed"], "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimisation"), help="where the run folders are")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    found = summary(evaluate(given.work, given.processes))
    disk.write_text(RESULTS / "held_out.json", json.dumps(found, indent=1) + "\n")
    print(f"{RESULTS / 'held_out.json'}: {len(found['runs'])} runs")


if __name__ == "__main__":
    main()
