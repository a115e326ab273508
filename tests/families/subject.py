"""One pipeline under test: the product's policies of it, diffusers' pipeline of it, and images of both from the same noise."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from conventions import CALLS, images
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.models.policy import Policy
from tdpo_cli.models.samplers import ddim
from tdpo_cli.sampling.generate import denoise

SIZE = (64, 96)  # pixels; not square, and multiples of all families' units
STEPS = 3
RANK, ALPHA = 2, 6  # unequal, so that a lost alpha shows
GUIDANCE = 4.0
SHORT, OTHER = "a red boat", "Three yellow birds in the sky"
LONG = "A portrait of an old man in a black hat, painting in oil, very detailed, soft light; " * 6 + "café №7, 東京 🚤"
PROMPTS = (SHORT, LONG, OTHER)
NOISE_SEED = 3
LEVELS = 2.0  # of 255: how far two images may differ and count as equal


class Case:
    """Policies and pipelines are loaded once and shared: a test that changes one loads its own."""

    def __init__(self, path: Path, name: str, loras: Path):
        self.path, self.name, self.loras = path, name, loras
        self.call, self.diffusion = CALLS[models.pipeline_class(str(path), {"_class_name": name})], models.family_of(str(path)).diffusion

    # --- the product -----------------------------------------------------------------------------------------------------
    def load(self, trainable: bool = True, negative_prompt: str = "", **settings: Any) -> Policy:
        """A policy of its own."""
        # a folder may say that its model is distilled: the contract holds for these too
        fixed = {"base": str(self.path), "dtype": "fp32", "resolution": SIZE, "lora_rank": RANK, "allow_distilled": True}
        model = Model(**(fixed | settings))
        policy = models.load(model, trainable=trainable, negative_prompt=negative_prompt)
        policy.set_schedule(STEPS)
        return policy

    @cached_property
    def base(self) -> Policy:
        """Without an adapter."""
        return self.load(trainable=False)

    @cached_property
    def fresh(self) -> Policy:
        """With an adapter that changes nothing yet."""
        return self.load()

    @cached_property
    def moved(self) -> Policy:
        """With an adapter as training might have left it, but further away."""
        policy = self.load()
        randomise(policy.trainable)
        return policy

    @property
    def noise(self) -> Tensor:
        """Initial latents, one for each of PROMPTS."""
        return torch.randn(len(PROMPTS), *self.base.latent_shape, generator=torch.Generator().manual_seed(NOISE_SEED))

    # --- diffusers -------------------------------------------------------------------------------------------------------
    def pipeline(self) -> Any:
        """diffusers' pipeline of the folder, in single precision, with the sampler that the product's rule makes of its scheduler."""
        index = json.loads((self.path / "model_index.json").read_text())
        nulls = {part: None for part, entry in index.items() if entry == [None, None]}  # asked for by name otherwise
        pipeline = getattr(diffusers, self.name).from_pretrained(self.path, torch_dtype=torch.float32, **nulls)
        pipeline.set_progress_bar_config(disable=True)
        if self.diffusion == "ddim":
            pipeline.scheduler = ddim.as_ddim(self.base.family.scheduler_config)
        if hasattr(pipeline, "watermark"):  # SDXL's, drawn wherever its package is installed
            pipeline.watermark = None
        return pipeline

    @cached_property
    def plain(self) -> Any:
        """A pipeline that is never changed."""
        return self.pipeline()

    @cached_property
    def plain_images(self) -> Tensor:
        """The guided images of that."""
        return self.theirs(self.plain)

    # --- images ----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def theirs(self, pipeline: Any, guidance: float = GUIDANCE, negative: str | None = None, **noise: Any) -> Tensor:
        """What the pipeline's own call draws, from `self.noise` unless another noise or generator is given."""
        arguments = self.call.arguments(self.base.family.guidance, guidance, negative, len(PROMPTS))
        return images(pipeline, self.call, PROMPTS, SIZE, STEPS, **arguments, **(noise or {"latents": self.noise}))

    @torch.no_grad()
    def ours(self, policy: Policy, guidance: float = GUIDANCE) -> Tensor:
        """What the product draws without noise in its steps."""
        policy, start = policy.scheduled(STEPS, 0.0), self.noise
        texts, rows = policy.encode(PROMPTS), torch.arange(len(PROMPTS))
        for *_, last in denoise(policy, texts, rows, start, lambda k: torch.zeros_like(start), guidance):  # noqa: B007 - the last one counts
            pass
        return policy.decode(last)

    # --- LoRA files ------------------------------------------------------------------------------------------------------
    @cached_property
    def own_lora(self) -> Path:
        """Saved by the product."""
        self.moved.save(self.loras / "own")
        return self.loras / "own"

    @cached_property
    def foreign(self) -> tuple[Path, Tensor]:
        """A LoRA made and saved in diffusers, and the images that it gives there."""
        pipeline, part = self.pipeline(), self.base.family.component
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(self.base.family.lora_targets)))
        randomise({name: parameter for name, parameter in network.named_parameters() if "lora_" in name})
        weights, metadata = get_peft_model_state_dict(network), network.peft_config["default"].to_dict()
        type(pipeline).save_lora_weights(self.loras / "foreign", **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": metadata})
        return self.loras / "foreign", self.theirs(pipeline)


@torch.no_grad()
def randomise(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give an adapter weights of noticeable size."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in sorted(parameters.items()):
        down = "lora_A" in name
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * (parameter.shape[1] ** -0.5 if down else 0.3))


def levels(one: Tensor, other: Tensor) -> float:
    """The largest difference of two sets of images, in levels of 255."""
    assert one.shape == other.shape and one.isfinite().all() and other.isfinite().all()
    return 255 * (one - other).abs().max().item()
