"""Time the engine of `tdpo sample` against the diffusers pipeline: one prompt a call, and prompts in batches.

    python benchmarks/sample.py --json
    python benchmarks/sample.py --pipeline FOLDER --images 24 --rounds 3

All make the same images from the same noise, without noise in the steps. Where these differ, no time is taken and the exit status is 1.
Loading and writing of files are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from pairs import compared, facts, in_turn, show  # noqa: E402
from PIL import Image  # noqa: E402

from tdpo_cli import models  # noqa: E402
from tdpo_cli.config import prompts as prompt_sources  # noqa: E402
from tdpo_cli.config.settings import Model, Preset  # noqa: E402
from tdpo_cli.machine import memory  # noqa: E402
from tdpo_cli.models import loading  # noqa: E402
from tdpo_cli.models.policy import Policy  # noqa: E402
from tdpo_cli.models.samplers.ddim import as_ddim  # noqa: E402
from tdpo_cli.randomness import Randomness  # noqa: E402
from tdpo_cli.sampling import grid  # noqa: E402
from tdpo_cli.sampling.generate import generate  # noqa: E402

RANDOMNESS = Randomness(0, "sample")
LEVELS = 0.02  # grey levels: the mean difference that rounding in another batch size may leave


def ours(policy: Policy, prompts: Sequence[str], guidance: float, batch_size: int) -> list[Image.Image]:
    """As `tdpo sample`, less the files."""
    batches = generate(policy, prompts, range(len(prompts)), RANDOMNESS, guidance, batch_size)
    return [grid.to_pil(image) for batch in batches for image in batch]


def plain(pipeline: DiffusionPipeline, policy: Policy, prompts: Sequence[str], guidance: float, batch_size: int) -> list[Image.Image]:
    """Calls of the pipeline on the noise of `ours`. A list as `prompt` is the batch inference of diffusers' documentation."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        latents = RANDOMNESS.initial_latents(0, range(start, start + len(batch)), policy.latent_shape)
        images += pipeline(batch, num_inference_steps=len(policy.timesteps), guidance_scale=guidance, latents=latents).images
    return images


def difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """The mean difference in grey levels, of the image where it is largest."""
    levels = lambda image: np.asarray(image, dtype=float)
    return max(float(np.abs(levels(a) - levels(b)).mean()) for a, b in zip(one, other, strict=True))


def measure(base: str, count: int, steps: int, guidance: float, batch_size: int, rounds: int) -> dict[str, Any]:
    """The differences of images, and the times where they agree."""
    policy = loading.load(Model(base=base), trainable=False).scheduled(steps, 0.0)
    pipeline = DiffusionPipeline.from_pretrained(models.resolve(base), **_absent(base))
    if policy.family.component == "unet":
        pipeline.scheduler = as_ddim(dict(policy.family.scheduler_config))  # the steps of `tdpo sample`
    pipeline.set_progress_bar_config(disable=True)
    known = prompt_sources.load("sandbox:all")
    prompts = [known[number % len(known)] for number in range(count)]
    own_batch = memory.sample_batch(Preset(model=Model(base=base)), None)
    candidates: dict[str, Callable[[], list[Image.Image]]] = {
        "tdpo": lambda: ours(policy, prompts, guidance, own_batch),
        "one prompt a call": lambda: plain(pipeline, policy, prompts, guidance, 1),
        f"batches of {batch_size}": lambda: plain(pipeline, policy, prompts, guidance, batch_size),
    }
    made = {name: make() for name, make in candidates.items()}
    found = max(difference(made["tdpo"], images) for images in made.values())
    report: dict[str, Any] = {"difference": found, "agree": found <= LEVELS, "pipeline": type(pipeline).__name__, "tdpo_batch": own_batch}
    if report["agree"]:
        report["times"] = compared(in_turn(candidates, rounds), "tdpo", count)
    return report


def _absent(base: str) -> dict[str, Any]:
    """Parts that are null in model_index.json: some classes need these as arguments."""
    index = json.loads((Path(models.resolve(base)) / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if isinstance(entry, list) and entry[-1] is None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", action="append", metavar="DIR", help="a diffusers folder or an embedded model [default: both sandboxes]")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=8, help="prompts a call of the batched pipeline; the engine's is the command's default")
    parser.add_argument("--rounds", type=int, default=3, help="paired runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    bases = options.pipeline or ["sandbox", "sandbox-flow"]
    report = {base: measure(base, options.images, options.steps, options.guidance, options.batch, options.rounds) for base in bases}
    if options.json:
        print(json.dumps({**facts(), "images": options.images, "steps": options.steps, "rounds": options.rounds, "pipelines": report}))
    else:
        for base, one in report.items():
            show(f"{base}, {one['pipeline']}: difference {one['difference']:.1e} grey levels", one.get("times", {}))
    wrong = [base for base, one in report.items() if not one["agree"]]
    for base in wrong:
        print(f"{base}: the images differ by {report[base]['difference']:.2g} grey levels, so no time was taken", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
