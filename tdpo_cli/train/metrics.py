"""What an epoch measured: its row of metrics.jsonl."""

from __future__ import annotations

import platform
import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import WorkError
from tdpo_cli.machine.world import World
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.rewards import scoring
from tdpo_cli.train.losses import approx_kl
from tdpo_cli.train.state import Job
from tdpo_cli.train.update import Step
from tdpo_cli.types import Credit, Trajectory


def row(
    job: Job, epoch: int, everyone: Trajectory, scores: dict[str, Tensor], credit: Credit,
    means: dict[str, Any], neurons: dict[str, Any], seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    columns: dict[str, Any] = {"epoch": epoch, "reward_queries": (epoch + 1) * len(everyone)}
    for name, values in scores.items():
        # of the training reward, the scores that trained; a watched reward with a score missing has no mean
        known = values[values.isfinite()].double() if name == job.preset.reward.train else values.double()
        whole = bool(known.isfinite().all())
        columns[f"rewards/{name}/mean"] = known.mean().item() if whole else None
        columns[f"rewards/{name}/std"] = known.std(correction=0).item() if whole else None
    others = [scores[name] for name in job.preset.reward.watch if name not in verdict.TRUE_REWARDS]
    columns["agreement"] = scoring.agreement(scores[job.preset.reward.train], others, everyone.prompts)
    columns |= means
    columns["critic_explained_variance"] = None
    if everyone.values is not None:
        known = credit.returns[:, 0].isfinite()
        returns = credit.returns[known]
        residual = (returns - everyone.values.cpu()[known]).var(correction=0)
        columns["critic_explained_variance"] = (1 - residual / returns.var(correction=0).clamp(min=1e-12)).item()
    columns["updates"] = job.updates
    for name in ("dormant_fraction", "dormant_overlap", "dormant_fraction_extra", "reset"):
        columns[name] = neurons.get(name)
    columns["mean_kl"] = credit.mean_kl
    columns |= {f"seconds/{name}": value for name, value in seconds.items()}
    columns["images_per_second"] = len(everyone) / seconds["total"]
    columns["peak_memory_bytes"] = int(job.world.max(torch.tensor(peak_memory(job.world.device))))  # of the process that needs most
    return columns


def summarise(steps: Sequence[Step], world: World) -> dict[str, float | int | None]:
    """Means over an epoch's optimizer steps, over all processes; `ratio_drift` is of its first one."""
    good = [step for step in steps if not step.skipped]
    if not good:
        raise WorkError("every optimizer step of the epoch had a non-finite loss or gradient; the last finished epoch is safe on disk.")
    pairs = torch.cat([step.log_ratios for step in good]).double()
    policy_sums = torch.stack([
        torch.tensor(float(len(pairs)), dtype=torch.float64, device=pairs.device),
        torch.cat([step.policy_losses for step in good]).sum(),
        torch.cat([step.policy_clipped for step in good]).double().sum(),
        approx_kl(pairs) * len(pairs),
    ])  # fmt: skip
    count, loss, clipped, kl = world.sum(policy_sums).tolist()
    drift = world.max(steps[0].log_ratios.abs().max() if len(steps[0].log_ratios) else torch.zeros((), device=pairs.device))
    mean = lambda column: torch.cat(column).double().mean().item() if column[0] is not None else None
    norm = lambda column: torch.stack(column).mean().item() if column[0] is not None else None
    return {
        "policy_loss": loss / count,
        "critic_loss": mean([step.critic_losses for step in good]),
        "approx_kl": kl / count,
        "policy_clip_fraction": clipped / count,
        "critic_clip_fraction": mean([step.critic_clipped for step in good]),
        "policy_grad_norm": norm([step.policy_grad_norm for step in good if not step.overflowed] or [None]),
        "critic_grad_norm": norm([step.critic_grad_norm for step in good]),
        "ratio_drift": drift.item(),
        "skipped_steps": sum(step.skipped for step in steps),
        "overflowed_steps": sum(step.overflowed for step in steps),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
