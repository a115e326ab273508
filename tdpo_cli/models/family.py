"""The seam of model families: what a family's file writes, and what all families share.

A family is three functions (`encode`, `denoise`, `decode`) and a few facts. The denoising loop, guidance, LoRA, the
reference, saving and memory are shared and know no family. The diffusers pipeline lends its parts, its `encode_prompt` and
its LoRA file format; its loop is not used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.models import config_values
from tdpo_cli.models.samplers import Sampler
from tdpo_cli.models.samplers.ddim import DDIM
from tdpo_cli.models.samplers.flow import DYNAMICS, Flow, noise_levels
from tdpo_cli.models.settings import ETA, FLOW_DYNAMICS, NOISE_LEVEL
from tdpo_cli.types import Conditioning

MARKS = 4  # tokens around a prompt, such as its start and end, at most
TOKENISED = 1000  # prompts at once


class Family:
    """Base of all families. `latent_shape` is the space the noise is drawn in, never packed: packing, lists, sign and time
    conventions are private to `denoise`."""

    component: ClassVar[str] = "transformer"  # what trains, and the prefix of its LoRA keys: unet | transformer
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # suffixes of module names
    shown_noise: ClassVar[float | None] = None  # noise of images that are shown, where the preset gives none; None: the sampler's own
    guidance: str = "cfg"  # cfg | embedded (the network reads the scale) | none
    text_encoders_leave: ClassVar[bool] = False  # they leave the device once prompts are encoded

    pipeline: DiffusionPipeline
    device: torch.device
    latent_shape: tuple[int, ...]
    scheduler_config: dict[str, Any]

    def __init__(self, pipeline: DiffusionPipeline, scheduler_config: dict[str, Any], device: torch.device, resolution: tuple[int, int] | None):
        self.pipeline, self.scheduler_config, self.device = pipeline, scheduler_config, device
        self.unread: dict[str, Callable[[], nn.Module]] = getattr(pipeline, "unread", {})  # text encoders that are read on demand
        self.latent_shape = self.shape_of(resolution)

    # --- what a family writes -------------------------------------------------------------------------------------------
    def shape_of(self, resolution: tuple[int, int] | None) -> tuple[int, ...]:
        """The shape of one latent for images of (height, width) pixels; None: the family's own size. Raises RequestError."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt."""
        raise NotImplementedError

    def denoise(self, x: Tensor, t: Tensor, texts: Conditioning, guidance: float) -> Tensor:
        """One call of the network, without classifier-free guidance. x [b,*latent_shape], t [b], texts b rows -> as x"""
        raise NotImplementedError

    def sampler(
        self, steps: int, noise: float | Sequence[float] | None = None, dynamics: str | None = None, window: tuple[int, int] | None = None
    ) -> Sampler:
        """The T steps with that much noise, None for the family's own; on the device. Raises RequestError.

        noise: DDIM's eta. Flow matching (`FlowFamily`) has more: see there.
        """
        if dynamics not in (None, "ddim"):
            raise RequestError(f"rollout.dynamics {dynamics} is for flow-matching models; this one is sampled with ddim.")
        if window is not None:
            raise RequestError("rollout.window is for flow-matching models; DDIM has noise in every step.")
        return DDIM.of(self.scheduler_config, steps, ETA if noise is None else noise).to(self.device)

    # --- what a family may change ---------------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> Any:
        """Of the text encoder that reads most of a prompt."""
        return self.pipeline.tokenizer

    @property
    def prompt_limit(self) -> int:
        """Tokens of a prompt that this text encoder reads."""
        return self.pipeline.tokenizer.model_max_length

    def encode_negative(self, prompt: str) -> Conditioning:
        """The one row of the unconditional half of guidance."""
        return self.encode([prompt])

    def combine(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022). All [b,*latent_shape]."""
        return unconditional + guidance * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """[b,*latent_shape] -> images [b,3,H,W] float32 in [0,1], through an AutoencoderKL with its scale and shift."""
        vae = self.pipeline.vae
        scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor
        if (shift := vae.config.get("shift_factor")) is not None:
            scaled = scaled + shift
        return self.finite(vae.decode(scaled.to(vae.dtype), return_dict=False)[0], latents)

    def finite(self, decoded: Tensor, latents: Tensor) -> Tensor:
        """A VAE's output in [-1,1] as images [b,3,H,W] float32 in [0,1]. Raises WorkError if a number is not finite.

        Clamping would turn an overflow into white, which a reward would score.
        """
        if not bool(decoded.isfinite().all()):
            dtype = str(self.pipeline.vae.dtype).removeprefix("torch.")
            if not bool(latents.isfinite().all()):
                raise WorkError("the denoised latents are not finite: the network overflowed or training diverged. Try --set model.dtype=bf16.")
            raise WorkError(
                f"the VAE decoded an image that is not finite, in {dtype}. Name another one: --set model.vae=PATH (for SDXL "
                "madebyollin/sdxl-vae-fp16-fix), or use --set model.dtype=bf16."
            )
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    # --- shared ---------------------------------------------------------------------------------------------------------
    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return getattr(self.pipeline, self.component)

    @network.setter
    def network(self, network: nn.Module) -> None:
        setattr(self.pipeline, self.component, network)

    def read_text_encoders(self) -> None:
        """Read those that are not in memory. Raises RequestError."""
        for name, read in self.unread.items():
            if getattr(self.pipeline, name) is None:
                setattr(self.pipeline, name, read().requires_grad_(False).eval())
        if self.unread:
            config_values.bound_tokenizers(self.pipeline.components, type(self.pipeline).__name__)

    def release_text_encoders(self) -> None:
        """Give back the memory of those that can be read again."""
        for name in self.unread:
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Text encoders are on the device inside. Outside, those that are large wait in main memory; on a CPU nothing moves."""
        moves = self.text_encoders_leave and self.device.type != "cpu"
        if moves:
            self.move_text_encoders(self.device)
        try:
            yield
        finally:
            if moves:
                self.move_text_encoders("cpu")

    def move_text_encoders(self, device: torch.device | str) -> None:
        """Put every text encoder that the pipeline has on the device."""
        with torch.inference_mode(False):  # else the moved weights could be used in inference mode only
            for name, part in self.pipeline.components.items():
                if name.startswith("text_encoder") and part is not None:
                    part.to(device)

    def longer_than_limit(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose ends are truncated. Short ones are not tokenised: a token has at least one letter of ASCII."""
        limit = self.prompt_limit
        doubtful = [prompt for prompt in prompts if len(prompt) > limit - MARKS or not prompt.isascii()]
        found = []
        for start in range(0, len(doubtful), TOKENISED):
            part = doubtful[start : start + TOKENISED]
            lengths = [len(ids) for ids in self.tokenizer(part, verbose=False).input_ids]
            found += [prompt for prompt, length in zip(part, lengths, strict=True) if length > limit]
        return found

    def normal_form(self, prompt: str) -> str:
        """The prompt as the first text encoder reads it, truncated and, with CLIP, in lower case. Statistics are kept under it."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer([prompt], truncation=True, max_length=self.prompt_limit).input_ids[0]
        return tokenizer.decode(ids, skip_special_tokens=True)


class FlowFamily(Family):
    """Base of the families that predict a velocity. Their text encoders are larger than many a denoiser."""

    text_encoders_leave = True
    shown_noise = 0.0
    patch: int  # side, in latents, of the square that is one image token

    def sampler(
        self, steps: int, noise: float | Sequence[float] | None = None, dynamics: str | None = None, window: tuple[int, int] | None = None
    ) -> Sampler:
        """noise: the level inside the window (first step, size) or, without one, in all steps but the last; or one level per step."""
        if dynamics == "ddim":
            raise RequestError(f"rollout.dynamics ddim is not for flow-matching models. These are: {', '.join(DYNAMICS)}.")
        if not isinstance(noise, Sequence):
            noise = noise_levels(steps, NOISE_LEVEL if noise is None else noise, window)
        elif len(noise) != steps:
            raise RequestError(f"{len(noise)} noise levels for {steps} denoising steps.")
        return Flow.of(self.scheduler_config, noise, dynamics or FLOW_DYNAMICS, window, self.mu(steps), self.unshifted(steps)).to(self.device)

    @property
    def tokens(self) -> int:
        """Image tokens of one latent."""
        return math.prod(self.latent_shape[-2:]) // self.patch**2

    def mu(self, steps: int) -> float | None:
        """The shift of a schedule that depends on the resolution: linear in the number of image tokens. None: the config's own shift."""
        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return None
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # here: it imports all of FLUX

        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return calculate_shift(self.tokens, *(config.get(name, default) for name, default in defaults.items()))

    def unshifted(self, steps: int) -> Sequence[float] | None:
        """The sigmas [T] before the shift: from 1 to 1/T, as most pipelines give them to their scheduler. None: down to its own smallest."""
        return np.linspace(1, 1 / steps, steps).tolist()


def tokens_before_prompt(tokenizer: Any) -> int:
    """How many tokens of a chat template stand before the user's words."""
    mark = "X"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(chat.partition(mark)[0]).input_ids)
