"""Sample a few prompts with one model and score the images: one part of a cross-evaluation."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdpo_cli import models
from tdpo_cli.cross_eval.candidates import Model, hashes, network
from tdpo_cli.cross_eval.folder import Folder, Part, write_json
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.machine import memory
from tdpo_cli.overoptimisation import statistics
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards import scoring
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.critic_encoder import critic_encoder
from tdpo_cli.sampling import grid
from tdpo_cli.sampling.generate import generate
from tdpo_cli.storage import disk

PURPOSE = "cross-eval"  # keeps its noise apart from training's


class Judges:
    """The rewards, and the eye that measures diversity, on one device."""

    def __init__(self, rewards: Mapping[str, str | None], diversity: bool, device: torch.device, warn: Callable[[str], None]):
        backbones = Backbones(device)
        paths = {name: path for name, path in rewards.items() if path is not None}
        self.rewards = scoring.load_rewards(list(rewards), backbones, paths)
        self.encoder = None
        if diversity:
            try:
                self.encoder = critic_encoder("aesthetic" if "aesthetic" in rewards else next(iter(rewards)), backbones, paths)
            except RequestError as error:  # of rewards that bring no image encoder of their own
                warn(f"diversity is not measured: {error}")

    def describe(self) -> dict[str, Any]:
        return {name: reward.describe() for name, reward in self.rewards.items()}

    def judge(self, images: Tensor, prompts: Sequence[str], per_prompt: int, batch_size: int) -> dict[str, Any]:
        """images [P*I,3,H,W] -> {"scores": {reward: [P][I]}, "distances": [P] or None}; a score that is not finite is None."""
        scores = {}
        for name, reward in self.rewards.items():
            try:
                column = scoring.score_images({name: reward}, images, prompts, batch_size)[name].tolist()
            except Exception as error:
                if isinstance(error, RequestError) or memory.exhausted(error):
                    raise
                raise WorkError(f"reward {name} failed on {prompts[0]!r}: {type(error).__name__}: {error}") from error
            shortest = [float(str(np.float32(score))) if math.isfinite(score) else None for score in column]
            scores[name] = [shortest[start : start + per_prompt] for start in range(0, len(shortest), per_prompt)]
        if self.encoder is None:
            return {"scores": scores, "distances": None}
        with torch.inference_mode():
            embeds = torch.cat([self.encoder(chunk).float().cpu() for chunk in images.split(batch_size)])
        return {"scores": scores, "distances": statistics.pairwise_distance(embeds.unflatten(0, (-1, per_prompt)).numpy()).tolist()}


def do(
    parts: Sequence[Part], all_models: Sequence[Model], prompts: Sequence[str], per_prompt: int, seed: int, batch_size: int,
    judges: Judges, folder: Folder, device: torch.device, advance: Callable[[int], None], warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the images and the file of every part; a part's file is written last. Raises RequestError, WorkError."""
    loaded, policy = None, None
    for number, first, end in parts:
        model = all_models[number]
        with _out_of_memory(batch_size):
            if loaded != number:
                policy = None  # the one before makes room first
                gc.collect()
                policy = _load(model, device)
                if loaded is None and (too_long := policy.longer_than_limit(prompts)):
                    warn(f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}...")
                loaded = number
            texts = [prompt for prompt in prompts[first:end] for _ in range(per_prompt)]
            ids = range(first * per_prompt, end * per_prompt)
            decode_chunk = memory.DECODED if device.type == "cuda" else None
            batches = generate(policy, texts, ids, Randomness(seed, PURPOSE), model.sampling.guidance_scale, batch_size, advance, decode_chunk)
            pictures = [grid.to_pil(image) for batch in batches for image in batch]
            # scored as they are on disk, in 8 bits, so that anyone can score the files again
            images = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).to(device).float() / 255
            judged = judges.judge(images, texts, per_prompt, batch_size)
        for i, picture in enumerate(pictures):
            with disk.whole(folder.path / "images" / model.name / image_name(first + i // per_prompt, i % per_prompt)) as aside:
                picture.save(aside, format="PNG")
        write_json(folder.part(model.name, first), judged)


def fetch(all_models: Sequence[Model], device: torch.device) -> None:
    """Load every base once and let it go: what is missing or wrong shows before anything is written, and what is downloaded is so once."""
    for model in all_models:
        if model.sampling.start_from is None:
            models.load(network(model.sampling), device=device, trainable=False, negative_prompt=model.sampling.negative_prompt)


def image_name(prompt: int, image: int) -> str:
    return f"{prompt:04d}-{image:02d}.png"


def _load(model: Model, device: torch.device) -> models.Policy:
    """Raises RequestError, also where the weights are gone or others than when the evaluation began."""
    weights = model.sampling.start_from
    if weights is not None and not Path(weights).exists():
        raise RequestError(f"{weights} is gone (a run with run.keep_last removes old checkpoints); begin anew with another --out.")
    if hashes(weights) != model.sha256:
        raise RequestError(f"{weights} is not the checkpoint that this evaluation began with; begin anew with another --out.")
    policy = models.load(network(model.sampling), device=device, trainable=False, negative_prompt=model.sampling.negative_prompt)
    policy.set_schedule(model.sampling.steps, model.sampling.eta)
    return policy


@contextlib.contextmanager
def _out_of_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, WorkError) or not memory.exhausted(error):
            raise
        hint = f"Begin anew with --batch-size {max(1, batch_size // 2)} and another --out" if batch_size > 1 else "Evaluate fewer --rewards at a time"
        said = first_line(error, "nothing left").rstrip(".")
        raise WorkError(f"out of memory: {said}. {hint}.") from error
