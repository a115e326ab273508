"""Replace the predicted micro-batch by one that was measured, before a run's first epoch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tdpo_cli.config.settings import Preset
from tdpo_cli.machine import footprint, memory
from tdpo_cli.machine.measure import Counter, Need, measure
from tdpo_cli.machine.networks import networks
from tdpo_cli.models.policy import Policy
from tdpo_cli.train.state import Job


def fit(job: Job, limit: int | None, counter: Counter) -> Need | None:
    """Set the micro-batch of the job's plan from a measurement. -> what was measured

    None where nothing is to be chosen: the preset names a micro-batch, there is no limit, or run.compile would compile every size anew.
    The other parts of the plan stay as predicted, and running out of memory still leads to a smaller plan.
    """
    if limit is None or job.preset.run.micro_batch is not None or job.preset.run.compile:
        return None
    need = measure(forward_backward(job.policy, job.preset, job.prompts[0]), counter)
    rows = -(-job.preset.update.batch_size // job.world.size)
    room = limit - not_yet_held(job)
    micro = min(need.largest(int(room), rows), memory.GPU_LADDER[0].micro_batch)
    micro = int(job.world.min(torch.tensor(micro)))  # the same on every process
    job.plan = replace(job.plan, micro_batch=micro)
    return need


def not_yet_held(job: Job) -> float:
    """Bytes that come later than the measurement: Adam's two moments, and the trajectory unless it waits in main memory."""
    trained = sum(parameter.numel() for parameter in job.policy.trainable.values())
    nets = networks(job.preset)
    trajectory = 0 if job.plan.offload else footprint.trajectory_bytes(job.preset, nets, job.world.size)
    return trained * 8 + trajectory


def forward_backward(policy: Policy, preset: Preset, prompt: str) -> Callable[[int], None]:
    """The work of the update on made-up latents: moves no weight, draws nothing at random, leaves no gradient."""
    texts, guidance = policy.encode([prompt]), preset.rollout.guidance_scale if preset.update.guidance else 1.0
    step = int(policy.stochastic.nonzero()[0])

    def work(rows: int) -> None:
        x, k = torch.zeros(rows, *policy.latent_shape, device=policy.device), torch.full((rows,), step, device=policy.device)
        inputs = x, k, texts, torch.zeros(rows, dtype=torch.long, device=policy.device), guidance
        try:
            transition = policy.transition(*inputs)
            if preset.update.kl_coef > 0:  # the reference computes while the policy's activations wait
                with torch.no_grad():
                    policy.transition(*inputs, reference=True)
            transition.log_prob(x).sum().backward()
        finally:
            for parameter in policy.trainable.values():
                parameter.grad = None

    return work
