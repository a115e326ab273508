"""The DDIM step with noise (Song et al. 2021, https://arxiv.org/abs/2010.02502) as a Gaussian transition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.types import Transition

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """What the T steps need, precomputed in fp32 (in fp64 the last step's log-prob moves by 2e-6). All [T] on one device."""

    timesteps: Tensor  # int64, descending
    abar: Tensor  # cumulative alpha of the step's timestep
    abar_prev: Tensor  # ... of the timestep it goes to
    sigma: Tensor  # standard deviation of the step
    prediction_type: str  # epsilon | sample | v_prediction
    clip_sample_range: float | None  # x0 is clamped to +- this
    threshold_ratio: float | None  # x0 is thresholded at this quantile of its magnitude (Imagen, section 2.3) ...
    threshold_max: float  # ... but at no more than this

    def to(self, device: torch.device | str) -> Schedule:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Schedule(**{**vars(self), **moved})

    def __len__(self) -> int:
        return len(self.timesteps)


def schedule(scheduler_config: dict, steps: int, eta: float) -> Schedule:
    """Any scheduler's config (PNDM, Euler, DDIM, ...) read as DDIM's, with its own timestep spacing. Raises RequestError."""
    scheduler = _as_ddim(scheduler_config)
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
    return Schedule(
        timesteps=timesteps,
        abar=abar,
        abar_prev=abar_prev,
        sigma=eta * variance**0.5,
        prediction_type=config.prediction_type,
        # absent in a config means true: the scheduler's own default
        clip_sample_range=config.clip_sample_range if config.clip_sample else None,
        threshold_ratio=config.dynamic_thresholding_ratio if config.thresholding else None,
        threshold_max=config.sample_max_value,
    )


def _as_ddim(config: dict) -> DDIMScheduler:
    # diffusers' StableDiffusionPipeline, through which the official code loads, makes every other offset 1 too
    config = {**config, "steps_offset": 1}
    if config.get("_class_name") != "DDIMScheduler" and config.get("timestep_spacing") == "linspace":
        # Euler's own default ends at timestep 0, where a DDIM step adds no noise: Stable Diffusion's spacing instead
        config["timestep_spacing"] = "leading"
    try:
        return DDIMScheduler.from_config(config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RequestError(f"the scheduler's config cannot be read as DDIM's: {first_line(error)}") from None


def transition(prediction: Tensor, x_t: Tensor, k: Tensor, schedule: Schedule) -> Transition:
    """p(x_{t-1} | x_t) of step k from the network's prediction (eq. 12). x_t, prediction [b,C,h,w]; k [b]; fp32 throughout."""
    prediction, x_t = prediction.float(), x_t.float()
    column = (-1, *[1] * (x_t.ndim - 1))
    abar_t = schedule.abar[k].view(column)
    abar_prev = schedule.abar_prev[k].view(column)
    sigma_t = schedule.sigma[k].view(column)

    if schedule.prediction_type == "epsilon":
        x_0 = (x_t - (1 - abar_t) ** 0.5 * prediction) / abar_t**0.5
        eps = prediction
    elif schedule.prediction_type == "sample":
        x_0 = prediction
        eps = (x_t - abar_t**0.5 * x_0) / (1 - abar_t) ** 0.5
    elif schedule.prediction_type == "v_prediction":
        x_0 = abar_t**0.5 * x_t - (1 - abar_t) ** 0.5 * prediction
        eps = abar_t**0.5 * prediction + (1 - abar_t) ** 0.5 * x_t
    else:
        raise AssertionError(f"prediction_type {schedule.prediction_type!r} passed schedule()")

    # eps is not re-derived from the clipped x_0
    if schedule.threshold_ratio is not None:
        x_0 = _threshold(x_0, schedule.threshold_ratio, schedule.threshold_max)
    elif schedule.clip_sample_range is not None:
        x_0 = x_0.clamp(-schedule.clip_sample_range, schedule.clip_sample_range)

    # never below 0 but by rounding (eta 1, zero terminal SNR)
    direction = (1 - abar_prev - sigma_t**2).clamp(min=0) ** 0.5 * eps
    return Transition(mean=abar_prev**0.5 * x_0 + direction, std=sigma_t, x0=x_0)


def _threshold(x_0: Tensor, ratio: float, largest: float) -> Tensor:
    s = x_0.flatten(1).abs().quantile(ratio, dim=1).clamp(1, largest).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
