"""DDIM with noise (Song et al. 2021, https://arxiv.org/abs/2010.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models.samplers import column, gaussian
from tdpo_cli.types import Transition

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class DDIM:
    """A Sampler. Tables are computed in fp32 (in fp64 the last step's log-prob moves by 2e-6). All [T] on one device."""

    timesteps: Tensor  # int64, descending
    abar: Tensor  # cumulative alpha of the step's timestep
    abar_prev: Tensor  # ... of the timestep it goes to
    std: Tensor  # standard deviation of the step
    prediction_type: str  # epsilon | sample | v_prediction
    clip_sample_range: float | None  # x0 is clamped to +- this
    threshold_ratio: float | None  # x0 is thresholded at this quantile of its magnitude (Imagen, section 2.3) ...
    threshold_max: float  # ... but at no more than this
    eta: float
    timestep_spacing: str

    @classmethod
    def of(cls, config: dict[str, Any], steps: int, eta: float) -> DDIM:
        """Read any scheduler's config (PNDM, Euler, DDIM, ...) as DDIM's, with its own timestep spacing. Raises RequestError."""
        if eta > 1:
            raise RequestError(f"noise (eta) {eta:g}: DDIM's is at most 1.")
        scheduler = as_ddim(config)
        last = scheduler.config.num_train_timesteps - 1
        if steps > last:
            raise RequestError(f"rollout.steps {steps} is too many: the model was trained with {last + 1} timesteps, so at most {last}.")
        if scheduler.config.prediction_type not in PREDICTION_TYPES:
            seen = scheduler.config.prediction_type
            raise RequestError(f"the scheduler's prediction_type is {seen!r}; supported: {', '.join(PREDICTION_TYPES)}.")
        scheduler.set_timesteps(steps)
        config = scheduler.config
        timesteps = scheduler.timesteps
        # clamped, never final_alpha_cumprod: set_alpha_to_one has no effect
        previous = (timesteps - config.num_train_timesteps // steps).clamp(0, last)
        abar, abar_prev = scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[previous]
        # eq. 16
        variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        return cls(
            timesteps=timesteps,
            abar=abar,
            abar_prev=abar_prev,
            std=eta * variance**0.5,
            prediction_type=config.prediction_type,
            # absent in a config means true: the scheduler's own default
            clip_sample_range=config.clip_sample_range if config.clip_sample else None,
            threshold_ratio=config.dynamic_thresholding_ratio if config.thresholding else None,
            threshold_max=config.sample_max_value,
            eta=eta,
            timestep_spacing=config.timestep_spacing,
        )

    @property
    def stochastic(self) -> Tensor:
        return self.std > 0

    def to(self, device: torch.device | str) -> DDIM:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return DDIM(**{**vars(self), **moved})

    def __len__(self) -> int:
        return len(self.timesteps)

    def check_trainable(self) -> None:
        """Raise RequestError if a step adds no noise."""
        silent = (~self.stochastic).nonzero().flatten().tolist()
        if silent:
            raise RequestError(
                f"denoising step {silent[0]} of {len(self)} (timestep {int(self.timesteps[silent[0]])}) adds no noise, so it has no log-probability "
                f"to train on. A policy gradient needs noise in every step: rollout.eta is {self.eta}; the scheduler's timestep_spacing is "
                f"{self.timestep_spacing!r} (`leading` works)."
            )

    def step(self, prediction: Tensor, x_t: Tensor, k: Tensor) -> Transition:
        """p(x_{t-1} | x_t) of step k from the network's prediction (eq. 12). x_t, prediction [b,C,h,w]; k [b]; fp32 throughout."""
        prediction, x_t = prediction.float(), x_t.float()
        abar_t, abar_prev, std = (column(table, k, x_t) for table in (self.abar, self.abar_prev, self.std))
        x0, eps = self._clean_and_noise(prediction, x_t, abar_t)
        # eps is not re-derived from the clipped x0
        if self.threshold_ratio is not None:
            x0 = _threshold(x0, self.threshold_ratio, self.threshold_max)
        elif self.clip_sample_range is not None:
            x0 = x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        # never below 0 but by rounding (eta 1, zero terminal SNR)
        coefficient = (1 - abar_prev - std**2).clamp(min=0) ** 0.5
        return gaussian(x0, eps, abar_prev**0.5, coefficient, std)

    def _clean_and_noise(self, prediction: Tensor, x_t: Tensor, abar_t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps, whatever of the two, or of their mixture, the network predicts. All [b,C,h,w]."""
        signal, noise = abar_t**0.5, (1 - abar_t) ** 0.5
        if self.prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        if self.prediction_type == "sample":
            return prediction, (x_t - signal * prediction) / noise
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t


def as_ddim(config: dict[str, Any]) -> DDIMScheduler:
    """Read any scheduler's config as DDIM's: without noise, diffusers' step of it is ours. Raises RequestError."""
    # diffusers drops the keys listed there when the class changes, also those that were set on purpose
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    config["set_alpha_to_one"] = False  # the last step goes to timestep 0, as in `DDIM.of`
    if config.get("_class_name") != "DDIMScheduler" and config.get("timestep_spacing") == "linspace":
        # Euler's own default ends at timestep 0, where a DDIM step adds no noise: Stable Diffusion's spacing instead
        config["timestep_spacing"] = "leading"
    try:
        return DDIMScheduler.from_config(config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RequestError(f"the scheduler's config cannot be read as DDIM's: {first_line(error)}") from None


def _threshold(x_0: Tensor, ratio: float, largest: float) -> Tensor:
    s = x_0.flatten(1).abs().quantile(ratio, dim=1).clamp(1, largest).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
