"""Flow matching with noise in the steps: Flow-SDE, Dance-SDE and CPS on the sigmas of diffusers' Euler scheduler.

The state is x = (1 - sigma) x0 + sigma eps and the network predicts the velocity v = eps - x0, so x0 = x - sigma v and
eps = x + (1 - sigma) v. All dynamics share mean = (1 - sigma') x0 + c eps and differ in (std, c):

    flow-sde   std = s sqrt(-dt), s = a sqrt(sigma / (1 - sigma))   c = sigma' - std^2 / (2 sigma)   Flow-GRPO, arXiv 2505.05470
    dance-sde  std = a sqrt(-dt)                                    c = sigma' - std^2 / (2 sigma)   DanceGRPO, arXiv 2505.07818
    cps        std = sigma' sin(a pi / 2)                           c = sqrt(sigma'^2 - std^2)       Flow-CPS, arXiv 2509.05952

a is the noise level of the step, sigma' the sigma it goes to, dt = sigma' - sigma < 0. a = 0 is the Euler step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.models.samplers import column, gaussian
from tdpo_cli.types import Transition

DYNAMICS = ("flow-sde", "cps", "dance-sde")
# below this sigma', std is so small in cps that one step has hundreds of times the sensitivity of the first
CPS_FLOOR = 0.05


@dataclass(frozen=True)
class Flow:
    """A Sampler. Tables are computed in fp32, in the order of the published code. All [T] fp32 on one device."""

    timesteps: Tensor  # 1000 sigma
    sigma: Tensor  # of the state before the step
    sigma_next: Tensor  # of the state it goes to
    std: Tensor  # standard deviation of the step
    coefficient: Tensor  # c
    diffusion: Tensor  # std without sqrt(-dt) for the two SDEs, std itself for cps: Flow-GRPO's KL divides by its square
    stochastic: Tensor  # bool: can be trained
    dynamics: str

    @classmethod
    def of(
        cls,
        config: dict[str, Any],
        noise_levels: Sequence[float],
        dynamics: str = "flow-sde",
        window: tuple[int, int] | None = None,
        mu: float | None = None,
        unshifted: Sequence[float] | None = None,
    ) -> Flow:
        """One step per noise level, on the schedule of a flow-matching scheduler's config. Raises RequestError.

        window: (first step, size), if one was asked for. mu: of a resolution-dependent shift. unshifted: sigmas before the
        shift, where the family gives its own.
        """
        timesteps, sigmas = _schedule(config, len(noise_levels), mu, unshifted)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        level = torch.tensor(noise_levels, dtype=torch.float64)
        std, coefficient, diffusion = _TABLES[dynamics](sigma, sigma_next, level)
        stochastic = std > 0
        if dynamics == "cps":
            inside = torch.zeros_like(stochastic)
            if window is not None:
                inside[window[0] : sum(window)] = True
            stochastic = stochastic & ((sigma_next >= CPS_FLOOR) | inside)
        return cls(timesteps, sigma, sigma_next, std, coefficient, diffusion, stochastic, dynamics)

    def to(self, device: torch.device | str) -> Flow:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Flow(**{**vars(self), **moved})

    def __len__(self) -> int:
        return len(self.timesteps)

    def check_trainable(self) -> None:
        """Raise RequestError unless there are trainable steps and they follow each other."""
        steps = self.stochastic.nonzero().flatten().tolist()
        if not steps:
            raise RequestError(
                f"none of the {len(self)} denoising steps can be trained: rollout.noise_level is 0 in all of them"
                + (f", or their sigma is below {CPS_FLOOR} (cps)." if self.dynamics == "cps" else ".")
                + " A policy gradient needs noise: raise rollout.noise_level, rollout.steps, or give rollout.window."
            )
        if steps != list(range(steps[0], steps[-1] + 1)):
            raise RequestError(f"the denoising steps that can be trained must follow each other, and these do not: {steps}.")

    def step(self, prediction: Tensor, x_t: Tensor, k: Tensor) -> Transition:
        """p(x' | x) of step k from the velocity. x_t, prediction [b,...]; k [b]; fp32 throughout."""
        velocity, x_t = prediction.float(), x_t.float()
        sigma, sigma_next, coefficient, std = (column(table, k, x_t) for table in (self.sigma, self.sigma_next, self.coefficient, self.std))
        x0 = x_t - sigma * velocity
        eps = x_t + (1 - sigma) * velocity
        return gaussian(x0, eps, 1 - sigma_next, coefficient, std)


def noise_levels(steps: int, level: float, window: tuple[int, int] | None) -> list[float]:
    """`level` inside the window (first step, size), 0 elsewhere; without a window in all steps but the last. Raises RequestError."""
    first, size = (0, steps - 1) if window is None else window
    if not (0 <= first and 0 < size and first + size <= steps) and window is not None:
        raise RequestError(f"a window of {size} steps from step {first} does not fit into {steps} denoising steps.")
    return [level if first <= k < first + size else 0.0 for k in range(steps)]


# --- the dynamics: (sigma, sigma', a), all [T], a in float64 -> std, c, diffusion ---------------------------------------------
def _flow_sde(sigma: Tensor, sigma_next: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # at sigma = 1 the division would be by 0: there, and only in the denominator, the second sigma takes its place
    denominator = 1 - torch.where(sigma == 1, sigma_next[0], sigma)
    return _sde(sigma, sigma_next, level.float() * (sigma / denominator).sqrt())


def _dance_sde(sigma: Tensor, sigma_next: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _sde(sigma, sigma_next, level.float())


def _sde(sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    std = diffusion * (sigma - sigma_next).sqrt()
    return std, sigma_next - std**2 / (2 * sigma), diffusion


def _cps(sigma: Tensor, sigma_next: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # the noise in the state is exactly sigma' again
    std = sigma_next * torch.sin(level * torch.pi / 2).float()
    return std, (sigma_next**2 - std**2).clamp(min=0).sqrt(), std


_TABLES = {"flow-sde": _flow_sde, "dance-sde": _dance_sde, "cps": _cps}


def _schedule(config: dict[str, Any], steps: int, mu: float | None, unshifted: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """diffusers' timesteps [T] and sigmas [T+1]. Raises RequestError."""
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(steps, mu=mu, **({} if unshifted is None else {"sigmas": list(unshifted)}))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise RequestError(f"the scheduler's config cannot be read as flow matching's: {first_line(error)}") from None
    sigmas = scheduler.sigmas
    if len(sigmas) != steps + 1 or not (sigmas.isfinite().all() and (sigmas[1:] < sigmas[:-1]).all() and sigmas[0] <= 1):
        shown = ", ".join(f"{value:.4g}" for value in sigmas.tolist()[:8])
        raise RequestError(f"the scheduler's sigmas must fall from at most 1 to 0 and do not with {steps} steps: {shown}. Use other rollout.steps.")
    return scheduler.timesteps, sigmas
