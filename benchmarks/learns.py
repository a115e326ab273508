"""Does a model learn? The same prompts and noise before and after training, for any diffusers folder.

    python benchmarks/learns.py FOLDER --algorithm tdpo-r --seeds 1 2 3 [--epochs 10] [--set update.learning_rate=1e-3 ...]

Trains on `jpeg-incompressibility`, which needs no checkpoint, and prints for each seed the mean difference of the paired rewards with
its standard error. Made for tiny random networks, where a reward's level means nothing and its rise does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from tdpo_cli.config import preset as presets
from tdpo_cli.console import Console
from tdpo_cli.machine import memory
from tdpo_cli.machine.world import World
from tdpo_cli.randomness import Randomness
from tdpo_cli.sampling.generate import generate
from tdpo_cli.train import train
from tdpo_cli.train.state import Job, build

REWARD = "jpeg-incompressibility"
SETTINGS = {
    "model.dtype": "fp32", "model.lora_rank": 8,
    "rollout.prompts": "simple-animals", "rollout.samples_per_epoch": 128, "rollout.steps": 5, "rollout.guidance_scale": 1.0,
    "reward.train": REWARD, "reward.zoo": "sandbox", "reward.min_count": 16,
    "algorithm.critic_init_std": 0.11, "algorithm.reset_every": 10,
    "update.batch_size": 32, "update.learning_rate": 3e-3, "update.max_grad_norm": 3e-3, "update.critic_learning_rate": 1e-3,
    "update.clip_range": 1e-3,
    "run.epochs": 10, "run.preview_images": 0,
}  # fmt: skip
PROMPTS = ["a cat", "a dog", "a red house", "two birds"]
IMAGES = 64  # before and after, of the same prompts and noise


def rewards(job: Job) -> torch.Tensor:
    """The reward of IMAGES images with the training's own schedule; their noise depends on nothing that trains. [IMAGES]"""
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(IMAGES)]
    batches = generate(job.policy, texts, range(IMAGES), Randomness(1234, "learns"), job.preset.rollout.guidance_scale, 16)
    return job.rewards[REWARD].score(torch.cat(list(batches)), texts).double().cpu()


def measure(preset: presets.Preset) -> dict[str, float]:
    """Train one run in memory. -> mean and standard error of the paired differences, and the CPU time of the training."""
    job = build(preset, World(), memory.Plan.of(32))
    before, began = rewards(job), time.process_time()
    for epoch in range(preset.run.epochs):
        train.run_epoch(job, epoch, Console(quiet=True))
    seconds = time.process_time() - began
    change = rewards(job) - before
    return {
        "before": float(before.mean()), "spread": float(before.std()), "rise": float(change.mean()),
        "standard_error": float(change.std() / len(change) ** 0.5), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--algorithm", nargs="+", default=["tdpo-r"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=SETTINGS["run.epochs"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = dict(presets.parse_override(text) for text in args.set)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        file.write_text("\n".join(PROMPTS))
        for algorithm in args.algorithm:
            for seed in args.seeds:
                chosen = {"model.base": str(args.folder), "algorithm.name": algorithm, "run.seed": seed, "run.epochs": args.epochs}
                preset = presets.override(presets.Preset(), list((SETTINGS | {"rollout.prompts": str(file)} | chosen | given).items()))
                row = measure(preset)
                verdict = "learns" if row["rise"] >= 2 * row["standard_error"] else "does not learn"
                print(json.dumps({"algorithm": algorithm, "seed": seed, "verdict": verdict} | {k: round(v, 4) for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
