"""One inner epoch: policy and critic take optimizer steps over the shuffled (sample, step) pairs of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpo_cli.algorithms.critic import DROPOUT, WIDTHS, Critic
from tdpo_cli.config.preset import Preset
from tdpo_cli.machine.transfer import rows, send
from tdpo_cli.machine.world import World
from tdpo_cli.models import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.train.losses import critic_loss, policy_loss
from tdpo_cli.train.state import Optimizers
from tdpo_cli.types import Conditioning, Credit, ShufflePlan, Trajectory


@dataclass
class Step:
    """One optimizer step, as an observer sees it. Per-pair fields hold this process' share, in the plan's order."""

    index: int  # within the inner epoch
    sample_index: Tensor  # [n] int64, the pairs of the whole global batch
    step_index: Tensor  # [n] int64
    share: slice  # this process' part of them
    log_probs: Tensor  # [share] float32, under the weights before this step
    log_ratios: Tensor  # [share] float32, log p - log p_old
    ratios: Tensor  # [share] float32
    policy_losses: Tensor  # [share] float64
    policy_clipped: Tensor  # [share] bool
    values: Tensor | None  # [n] float32, the critic in training (dropout on)
    critic_losses: Tensor | None  # [n] float64
    critic_clipped: Tensor | None  # [n] bool
    policy_grad_norm: Tensor  # [] before clipping
    critic_grad_norm: Tensor | None
    skipped: bool  # a loss or gradient was not finite, no weight has moved
    overflowed: bool  # fp16 loss scale too large: not a fault, the policy's step was left out


class Observer:
    """Looks on while the update runs: progress bars, tests and traces. Does nothing by itself."""

    def before_step(self, index: int, sample_index: Tensor, step_index: Tensor) -> None:
        """Weights as they are before the step."""

    def gradients(self, index: int) -> None:
        """Gradients of the whole global batch are in `.grad`, unscaled, not clipped yet."""

    def after_step(self, step: Step) -> None:
        """Weights and optimizer states as they are after the step."""


def update(
    policy: Policy,
    critic: Critic | None,
    optimizers: Optimizers,
    everyone: Trajectory,
    credit: Credit,
    plan: ShufflePlan,
    preset: Preset,
    randomness: Randomness,
    inner: int,
    micro_batch: int,
    world: World,
    observer: Observer,
) -> list[Step]:
    """Walk the plan, one optimizer step per effective batch. Every process takes its share of each batch's network calls."""
    settings, steps = preset.update, []
    everyone, credit = _brought(everyone, policy.device), _brought(credit, policy.device)
    all_timesteps = preset.algorithm.update_mode == "all-timesteps"
    for index, (samples, ks) in enumerate(plan.optimizer_steps(settings.batch_size, all_timesteps)):
        observer.before_step(index, samples, ks)
        optimizers.policy.zero_grad(set_to_none=True)
        share = world.share(len(samples))
        policy_part = _policy_backward(policy, optimizers, everyone, credit, samples[share], ks[share], len(samples), preset, micro_batch)
        world.sum_gradients(policy.trainable.values())
        critic_part = (None, None, None)
        if critic is not None:
            optimizers.critic.zero_grad(set_to_none=True)
            masks = _keep_masks(randomness, everyone.epoch, inner, index, len(samples), preset)
            critic_part = _critic_backward(critic, everyone, credit, samples, ks, masks, preset)
        optimizers.scaler.unscale_(optimizers.policy)
        observer.gradients(index)
        norms, skipped, overflowed = _step(policy, critic, optimizers, settings.max_grad_norm, policy_part[3], world)
        if critic is not None and not skipped:
            _more_critic_steps(critic, optimizers, everyone, credit, samples, ks, randomness, inner, index, preset)
        steps.append(Step(index, samples, ks, share, *policy_part, *critic_part, *norms, skipped, overflowed))
        observer.after_step(steps[-1])
    return steps


def _brought(record: Trajectory | Credit, device: torch.device) -> Trajectory | Credit:
    """The small columns on the device, once and not at every micro-step; latents stay where they are."""
    columns = {name: value for name, value in vars(record).items() if isinstance(value, Tensor) and name not in ("latents", "images", "sample_ids")}
    if isinstance(record, Trajectory):
        columns["texts"] = record.texts
    return replace(record, **{name: value.to(device) if isinstance(value, Conditioning) else send(value, device) for name, value in columns.items()})


def _policy_backward(
    policy: Policy, optimizers: Optimizers, everyone: Trajectory, credit: Credit,
    samples: Tensor, ks: Tensor, total: int, preset: Preset, micro_batch: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Accumulate the gradient of this process' share of the mean over `total` pairs.

    -> log-probs, log ratios, ratios, losses, clipped; each [share]
    """
    guidance = preset.rollout.guidance_scale if preset.update.guidance else 1.0
    device, parts = policy.device, []
    for sample, k in zip(samples.split(micro_batch), ks.split(micro_batch), strict=True) if len(samples) else ():
        stored = rows(everyone.latents, sample, k)
        x_t, x_next = (send(everyone.latents[stored[0], stored[1] + next_], device) for next_ in (0, 1))
        sample, k = send(sample, device), send(k, device)
        transition = policy.transition(x_t, everyone.steps[k], everyone.texts, everyone.text_rows[sample], guidance)
        log_prob = transition.log_prob(x_next)
        log_ratio = log_prob - everyone.log_probs[sample, k]
        ratio = log_ratio.exp()
        losses, clipped = policy_loss(ratio, credit.advantages[sample, k], preset.update.clip_range)
        optimizers.scaler.scale(losses.sum() / total).backward()
        parts.append((log_prob.detach(), log_ratio.detach(), ratio.detach(), losses.detach(), clipped))
    if not parts:  # more processes than pairs
        empty = torch.zeros(0, device=device)
        return empty, empty, empty, empty.double(), empty.bool()
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _critic_backward(
    critic: Critic, everyone: Trajectory, credit: Credit, samples: Tensor, ks: Tensor, masks: Sequence[Tensor] | None, preset: Preset
) -> tuple[Tensor, Tensor, Tensor]:
    """The critic is tiny: every process computes the whole batch on an identical replica. -> values, losses, clipped; [n]"""
    device = critic.layers[0].weight.device
    samples, ks = send(samples, device), send(ks, device)
    values = critic(everyone.image_embeds[samples, ks], None if masks is None else [send(mask, device) for mask in masks])
    old_values, returns = everyone.values[samples, ks], credit.returns[samples, ks]
    losses, clipped = critic_loss(values, old_values, returns, preset.update.clip_range_critic)
    (preset.algorithm.critic_coef * losses.mean()).backward()
    return values.detach(), losses.detach(), clipped


def _more_critic_steps(
    critic: Critic, optimizers: Optimizers, everyone: Trajectory, credit: Credit, samples: Tensor, ks: Tensor,
    randomness: Randomness, inner: int, index: int, preset: Preset,
) -> None:  # fmt: skip
    """`algorithm.critic_steps` beyond the published one, on the same batch with fresh dropout; not finite: left out."""
    for repeat in range(1, preset.algorithm.critic_steps):
        optimizers.critic.zero_grad(set_to_none=True)
        masks = _keep_masks(randomness, everyone.epoch, inner, index, len(samples), preset, repeat)
        _critic_backward(critic, everyone, credit, samples, ks, masks, preset)
        if torch.nn.utils.clip_grad_norm_(list(critic.parameters()), preset.update.max_grad_norm).isfinite():
            optimizers.critic.step()


def _keep_masks(randomness: Randomness, epoch: int, inner: int, index: int, rows: int, preset: Preset, repeat: int = 0) -> list[Tensor] | None:
    if not preset.algorithm.critic_dropout:
        return None
    return randomness.keep_masks(epoch, inner, index, rows, WIDTHS[: len(DROPOUT)], DROPOUT, repeat)


def _step(
    policy: Policy, critic: Critic | None, optimizers: Optimizers, max_norm: float, losses: Tensor, world: World
) -> tuple[tuple[Tensor, Tensor | None], bool, bool]:
    """Clip each network's gradient on its own and step. -> (norms before clipping, skipped, overflowed)"""
    clip = torch.nn.utils.clip_grad_norm_
    policy_norm = clip(list(policy.trainable.values()), max_norm)
    critic_norm = None if critic is None else clip(list(critic.parameters()), max_norm)
    policy_finite = bool(policy_norm.isfinite())
    critic_finite = critic_norm is None or bool(critic_norm.isfinite())
    overflowed = False
    if optimizers.scaler.is_enabled() and not policy_finite and critic_finite:
        # finite losses whose scaled gradients are not: the scale was too large. Otherwise it is a fault, as in fp32
        overflowed = bool(world.sum((~losses.isfinite()).sum().float()) == 0)
    skipped = not overflowed and not (policy_finite and critic_finite)
    if not skipped:
        optimizers.scaler.step(optimizers.policy)  # leaves the step out if the scaled gradients overflowed
        if optimizers.critic is not None:
            optimizers.critic.step()
    if optimizers.scaler.is_enabled():
        optimizers.scaler.update()
    return (policy_norm, critic_norm), skipped, overflowed
