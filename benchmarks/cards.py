"""What cards of 16, 24, 48 and 80 GB hold: a table of predictions by the product's own plan code. Needs no GPU, no network and no torch.

    python benchmarks/cards.py [--resolution 512 --resolution 1024] [--json]

Each row is GRPO with a LoRA of rank 32, micro-batch 1 with gradient checkpointing, scorers parked and the trajectory offloaded; PickScore
trains and HPSv2, ImageReward and the aesthetic predictor watch. The last columns say the largest micro-batch of a card's plan.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.console import size
from tdpo_cli.machine import memory

BASES = {
    "Stable Diffusion 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.2 klein 4B": "black-forest-labs/FLUX.2-klein-base-4B",
    "Z-Image": "Tongyi-MAI/Z-Image",
    "Qwen-Image": "Qwen/Qwen-Image",
}
TIGHT = memory.Plan(1, 1, 1, checkpointing=True, park=True, offload=True)
PRECISIONS = {"bf16": None, "int8": "int8", "nf4": "nf4"}


def preset_of(base: str, quantise: str | None, resolution: int) -> Preset:
    settings = {
        "model.base": base, "model.dtype": "bf16", "model.lora_rank": 32, "model.quantise": quantise, "model.resolution": resolution,
        "algorithm.name": "grpo", "rollout.samples_per_epoch": 64, "rollout.steps": 10, "rollout.guidance_scale": 4.0, "update.batch_size": 32,
        "reward.train": "pickscore", "reward.watch": ["hpsv2", "imagereward", "aesthetic"], "algorithm.update_mode": "all-timesteps",
    }  # fmt: skip
    return presets.override(Preset(), list(settings.items()))


def rows(resolution: int) -> list[dict[str, Any]]:
    found = []
    for name, base in BASES.items():
        for precision, quantise in PRECISIONS.items():
            preset = preset_of(base, quantise, resolution)
            phases = memory.phases(preset, 1, TIGHT)
            plans = {card: one["plan"] for card, one in memory.cards(preset).items()}
            found.append({"model": name, "base": precision, "bytes": max(phases.values()), "phase": max(phases, key=phases.get), "cards": plans})
    return found


def words(plan: dict[str, Any] | None) -> str:
    return "-" if plan is None else f"{plan['micro_batch']}{'*' if plan['checkpointing'] else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory predictions by card.")
    parser.add_argument("--resolution", type=int, action="append", help="pixels a side, may be repeated (default: 512 and 1024)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    found = {resolution: rows(resolution) for resolution in options.resolution or (512, 1024)}
    if options.json:
        return print(json.dumps(found))
    print(f"| at {' / '.join(map(str, found))} pixels | base weights | peak | {' | '.join(f'{card} GB' for card in memory.CARDS)} |")
    print("|" + "---|" * (3 + len(memory.CARDS)))
    for same in zip(*found.values(), strict=True):
        cells = [same[0]["model"], same[0]["base"], " / ".join(size(row["bytes"]) for row in same)]
        cells += [" / ".join(words(row["cards"][str(card)]) for row in same) for card in memory.CARDS]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
