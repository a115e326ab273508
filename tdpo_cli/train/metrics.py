"""What an epoch measured: its row of metrics.jsonl."""

from __future__ import annotations

import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import WorkError
from tdpo_cli.machine.world import World
from tdpo_cli.overoptimisation import agreement
from tdpo_cli.train.losses import approx_kl
from tdpo_cli.train.state import Job
from tdpo_cli.train.update import Step
from tdpo_cli.types import Credit, Trajectory


@dataclass(frozen=True)
class EpochResult:
    """What one epoch left behind. Samples, scores and credit are of all processes."""

    epoch: int
    samples: Trajectory
    scores: dict[str, Tensor]  # reward -> [N]
    credit: Credit
    steps: list[Step]
    neurons: dict[str, Any]  # the algorithm's statistics of the critic, empty without one
    constraints: dict[str, float]  # their columns, empty without any
    seconds: dict[str, float]


def row(job: Job, result: EpochResult) -> dict[str, Any]:
    """The epoch's row of metrics.jsonl; the same on every process but for the seconds."""
    samples, seconds = result.samples, result.seconds
    return {
        "epoch": result.epoch,
        "reward_queries": (result.epoch + 1) * len(samples),
        **_rewards(job, result),
        **result.constraints,
        **summarise(result.steps, job.world, job.preset.update.kl_coef > 0),
        **per_step(result.steps, job.preset.stochastic_steps, job.world),
        "ema": None if job.optimizers.average is None else job.optimizers.average.distance(),
        "critic_explained_variance": _explained_variance(samples.values, result.credit),
        "updates": job.updates,
        **{name: result.neurons.get(name) for name in ("dormant_fraction", "dormant_overlap", "dormant_fraction_extra", "reset")},
        "mean_kl": result.credit.mean_kl,
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "images_per_second": len(samples) / seconds["total"],
        "peak_memory_bytes": int(job.world.max(torch.tensor(peak_memory(job.world.device)))),  # of the process that needs most
    }


def _rewards(job: Job, result: EpochResult) -> dict[str, float | None]:
    """Mean and spread of every reward, and how far the trained and the watched rewards agree."""
    preset, scores, columns = job.preset, result.scores, {}
    trained = job.combination.trained(scores)
    for name, values in (scores | {preset.trained: trained}).items():
        # of what takes part in training, the known scores; a watched reward with a score missing has no mean
        known = values[values.isfinite()].double() if name in (preset.trained, *job.combination.names) else values.double()
        whole = bool(known.isfinite().all())
        columns[f"rewards/{name}/mean"] = known.mean().item() if whole else None
        columns[f"rewards/{name}/std"] = known.std(correction=0).item() if whole else None
    return columns | {"agreement": agreement.of_samples(trained, [scores[name] for name in preset.judges], result.samples.prompts)}


def _explained_variance(values: Tensor | None, credit: Credit) -> float | None:
    """1 - var(R - V) / var(R) of the critic's values V [N,S] over the samples that trained; None without a critic."""
    if values is None:
        return None
    known = credit.returns[:, 0].isfinite()
    returns = credit.returns[known]
    residual = (returns - values.cpu()[known]).var(correction=0)
    return (1 - residual / returns.var(correction=0).clamp(min=1e-12)).item()


def summarise(steps: Sequence[Step], world: World, with_kl: bool = False) -> dict[str, float | int | None]:
    """Means over an epoch's optimizer steps, over all processes; `ratio_drift` is of its first one."""
    good = [step for step in steps if not step.outcome.skipped]
    if not good:
        raise WorkError("every optimizer step of the epoch had a non-finite loss or gradient; the last finished epoch is safe on disk.")
    pairs = torch.cat([step.policy.log_ratios for step in good]).double()
    policy_sums = torch.stack([
        torch.tensor(float(len(pairs)), dtype=torch.float64, device=pairs.device),
        torch.cat([step.policy.losses for step in good]).sum(),
        torch.cat([step.policy.clipped for step in good]).double().sum(),
        approx_kl(pairs) * len(pairs),
        torch.cat([step.policy.kl for step in good]).double().sum(),
    ])  # fmt: skip
    count, loss, clipped, kl, reference_kl = world.sum(policy_sums).tolist()
    first = steps[0].policy.log_ratios
    drift = world.max(first.abs().max() if len(first) else torch.zeros((), device=pairs.device))
    criticised = [step.critic for step in good if step.critic is not None]
    mean = lambda name: torch.cat([getattr(part, name) for part in criticised]).double().mean().item() if criticised else None
    norm = lambda norms: torch.stack(norms).mean().item() if norms else None
    return {
        "policy_loss": loss / count,
        "kl_loss": reference_kl / count if with_kl else None,  # before its coefficient
        "critic_loss": mean("losses"),
        "approx_kl": kl / count,
        "policy_clip_fraction": clipped / count,
        "critic_clip_fraction": mean("clipped"),
        "policy_grad_norm": norm([step.outcome.policy_grad_norm for step in good if not step.outcome.overflowed]),
        "critic_grad_norm": norm([step.outcome.critic_grad_norm for step in good if step.critic is not None]),
        "ratio_drift": drift.item(),
        "skipped_steps": sum(step.outcome.skipped for step in steps),
        "overflowed_steps": sum(step.outcome.overflowed for step in steps),
    }


def per_step(steps: Sequence[Step], columns: int, world: World) -> dict[str, list[float | None]]:
    """Ratios and clipping of each trained denoising step on its own, noisiest first; null for one that no pair was of."""
    good = [step for step in steps if not step.outcome.skipped]
    column = torch.cat([step.batch.step_index[step.batch.own] for step in good])
    ratios, clipped = (torch.cat([getattr(step.policy, name) for step in good]).double() for name in ("ratios", "clipped"))
    # around 1, which the ratios are near to: their squares would lose the digits that count
    values = torch.stack([torch.ones_like(ratios), ratios - 1, (ratios - 1) ** 2, clipped])
    sums = torch.zeros(len(values), columns, dtype=torch.float64, device=values.device).index_add_(1, column.to(values.device), values)
    rows = world.sum(sums).T.tolist()
    known = lambda of: [of(*row) if row[0] else None for row in rows]
    return {
        "steps/ratio_mean": known(lambda count, off, square, clip: 1 + off / count),
        "steps/ratio_std": known(lambda count, off, square, clip: max(square / count - (off / count) ** 2, 0.0) ** 0.5),
        "steps/clip_fraction": known(lambda count, off, square, clip: clip / count),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
