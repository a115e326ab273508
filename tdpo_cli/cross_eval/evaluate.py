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

from tdpo_cli.console import Console
from tdpo_cli.cross_eval.candidates import Model, hashes
from tdpo_cli.cross_eval.folder import Folder, Part
from tdpo_cli.errors import RequestError, WorkError, described, first_line
from tdpo_cli.machine import memory
from tdpo_cli.models import load
from tdpo_cli.models.policy import Policy
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
                raise WorkError(f"reward {name} failed on {prompts[0]!r}: {described(error)}") from error
            shortest = [float(str(np.float32(score))) if math.isfinite(score) else None for score in column]
            scores[name] = [shortest[start : start + per_prompt] for start in range(0, len(shortest), per_prompt)]
        if self.encoder is None:
            return {"scores": scores, "distances": None}
        with torch.inference_mode():
            embeds = torch.cat([self.encoder(chunk).float().cpu() for chunk in images.split(batch_size)])
        return {"scores": scores, "distances": statistics.pairwise_distance(embeds.unflatten(0, (-1, per_prompt)).numpy()).tolist()}


class Evaluator:
    """Does parts of an evaluation on one device: sample with one model at a time, score the images.

    `task` is the content of request.json, `models` are its models.
    """

    def __init__(self, task: Mapping[str, Any], models: Sequence[Model], folder: Folder, device: torch.device, console: Console):
        self.models, self.folder, self.device, self.console = models, folder, device, console
        self.prompts, self.per_prompt = task["prompts"], task["per_prompt"]
        self.randomness, self.batch_size = Randomness(task["seed"], PURPOSE), task["batch_size"]
        self.judges = Judges(task["rewards"], self.per_prompt > 1, device, console.warn)
        self._loaded: tuple[int, Policy] | None = None  # number of the model, and its policy

    def run(self, parts: Sequence[Part]) -> None:
        """Write the images and the file of every part; a part's file is written last. Raises RequestError, WorkError."""
        steps = sum((end - first) * self.per_prompt * self.models[number].sampling.steps for number, first, end in parts)
        with self.console.progress("sampling and scoring", steps) as advance:
            for part in parts:
                self._do(part, advance)

    def _do(self, part: Part, advance: Callable[[int], None]) -> None:
        number, first, end = part
        model, texts = self.models[number], [prompt for prompt in self.prompts[first:end] for _ in range(self.per_prompt)]
        with _out_of_memory(self.batch_size):
            policy = self._policy(number)
            ids = range(first * self.per_prompt, end * self.per_prompt)
            decode_chunk = memory.DECODED if self.device.type == "cuda" else None
            batches = generate(policy, texts, ids, self.randomness, model.sampling.guidance_scale, self.batch_size, advance, decode_chunk)
            pictures = [grid.to_pil(image) for batch in batches for image in batch]
            # scored as they are on disk, in 8 bits, so that anyone can score the files again
            images = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).to(self.device).float() / 255
            judged = self.judges.judge(images, texts, self.per_prompt, self.batch_size)
        self.folder.still_there()
        for i, picture in enumerate(pictures):
            name = image_name(first + i // self.per_prompt, i % self.per_prompt)
            with disk.whole(self.folder.path / "images" / model.name / name, inside=self.folder.path) as aside:
                picture.save(aside, format="PNG")
        self.folder.write_part(model.name, first, judged)

    def _policy(self, number: int) -> Policy:
        """Of that model; it replaces the one before."""
        if self._loaded is None or self._loaded[0] != number:
            is_first, self._loaded = self._loaded is None, None  # the one before makes room first
            gc.collect()
            policy = _load(self.models[number], self.device)
            if is_first and (too_long := policy.longer_than_limit(self.prompts)):
                self.console.warn(
                    f"{len(too_long)} prompts are longer than the text encoder reads; their ends are cut off, as of {too_long[0][:60]!r}..."
                )
            self._loaded = number, policy
        return self._loaded[1]


def prompts_at_once(task: Mapping[str, Any]) -> int:
    """Prompts of one part: fixed, so that neither processes nor interruptions change which images share a network call."""
    return max(1, task["batch_size"] // task["per_prompt"])


def fetch(all_models: Sequence[Model], device: torch.device) -> None:
    """Load every base once and let it go: what is missing or wrong shows before anything is written, and what is downloaded is so once."""
    for model in all_models:
        if model.sampling.checkpoint.weights is None:
            load(model.sampling.checkpoint.section, device=device, trainable=False, negative_prompt=model.sampling.negative_prompt)


def image_name(prompt: int, image: int) -> str:
    return f"{prompt:04d}-{image:02d}.png"


def _load(model: Model, device: torch.device) -> Policy:
    """Raises RequestError, also where the weights are gone or others than when the evaluation began."""
    weights = model.sampling.checkpoint.weights
    if weights is not None and not Path(weights).exists():
        raise RequestError(f"{weights} is gone (a run with run.keep_last removes old checkpoints); begin anew with another --out.")
    if hashes(weights) != model.sha256:
        raise RequestError(f"{weights} is not the checkpoint that this evaluation began with; begin anew with another --out.")
    policy = load(model.sampling.checkpoint.section, device=device, trainable=False, negative_prompt=model.sampling.negative_prompt)
    return policy.scheduled(model.sampling.steps, model.sampling.noise)


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
