"""The equality gate: a faster loop counts only if it does the same work as exactly as the stand-in does."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch
from setup import Bench
from standin import Schedule, Trained, log_prob, predict
from torch import Tensor

from tdpo_cli.models import adapter
from tdpo_cli.types import Credit, ShufflePlan, Trajectory

NO_WORSE = 1.5  # rounding errors of two orders of summation differ by chance, a lower precision by much more
# relative to the gradient's norm, by the reference's type: too small to compare, and large enough to be another gradient
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}
ANOTHER = {torch.float64: 1e-3, torch.float32: 0.3}
DRIFT = 2e-6  # of a log-prob in fp32


@dataclass(frozen=True)
class Gate:
    """What was compared; `reasons` is empty if it holds."""

    updates: int
    standin_updates: int
    gradient_error: float  # of the first optimizer step against one precision up: |g - g_ref| / |g_ref|
    standin_gradient_error: float
    ratio_drift: float
    standin_ratio_drift: float
    reasons: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict:
        return {**asdict(self), "holds": self.holds}


def reference_gradient(bench: Bench, trajectory: Trajectory, credit: Credit, plan: ShufflePlan) -> tuple[Tensor, torch.dtype]:
    """The first optimizer step's gradient of the policy, pair by pair, one precision up (fp64 for fp32, fp32 for half), ratios exactly 1."""
    dtype = torch.float64 if bench.policy.unet.dtype == torch.float32 else torch.float32
    unet, schedule = copy.deepcopy(bench.policy.unet).to(dtype), Schedule(bench)
    weights = list(adapter.parameters(unet).values())
    for weight in weights:
        weight.requires_grad_(True).grad = None
    samples, steps = next(plan.optimizer_steps(bench.preset.update.batch_size, False))
    for sample, k in zip(samples.split(1), steps.split(1), strict=True):
        x_t, x_next = trajectory.latents[sample, k].to(bench.device), trajectory.latents[sample, k + 1].to(bench.device)
        rows = trajectory.text_rows[sample.to(trajectory.text_rows.device)]
        step, embeds = k.to(bench.device), trajectory.texts[rows].parts["embeds"]
        prediction = predict(bench, x_t, step, embeds, bench.preset.rollout.guidance_scale, unet)
        density = log_prob(x_next.to(dtype), *schedule.step(prediction, x_t, step, True, dtype))
        ratio = (density - density.detach()).exp()
        (-credit.advantages[sample, k].to(bench.device) * ratio / len(samples)).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in weights]), dtype


def compare(bench: Bench, ours: Trained, standin: Trained, reference: tuple[Tensor, torch.dtype]) -> Gate:
    exact, dtype = reference
    error, standin_error = ((one.first_gradient.to(exact) - exact).norm().item() / exact.norm().item() for one in (ours, standin))
    reasons = []
    if ours.updates != standin.updates or ours.updates != bench.preset.updates_per_epoch:
        reasons.append(f"{ours.updates} optimizer steps, the stand-in's {standin.updates}, the preset's {bench.preset.updates_per_epoch}")
    if not standin_error < ANOTHER[dtype]:
        reasons.append(f"the stand-in's gradient is another one: {standin_error:.3g} from the reference")
    if not error <= max(NO_WORSE * standin_error, ROUNDING[dtype]) or not error < ANOTHER[dtype]:
        reasons.append(f"the gradient is {error:.3g} from the reference, the stand-in's {standin_error:.3g}")
    if not ours.ratio_drift <= standin.ratio_drift + DRIFT:
        reasons.append(f"ratio_drift {ours.ratio_drift:.3g}, the stand-in's {standin.ratio_drift:.3g}")
    return Gate(ours.updates, standin.updates, error, standin_error, ours.ratio_drift, standin.ratio_drift, tuple(reasons))
