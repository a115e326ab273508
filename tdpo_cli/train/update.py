"""One inner epoch: policy and critic take optimizer steps over the shuffled (sample, column) pairs of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpo_cli.algorithms.critic import DROPOUT, WIDTHS, Critic
from tdpo_cli.config.settings import Preset
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.transfer import send
from tdpo_cli.machine.world import World
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.train import sharing
from tdpo_cli.train.losses import critic_loss, guarded_log_ratio, policy_loss, reference_kl
from tdpo_cli.train.state import Optimizers
from tdpo_cli.types import Conditioning, Credit, ShufflePlan, Trajectory, Transition

WHERE_THEY_ARE = ("latents", "images", "sample_ids", "home")  # columns that the update does not move to the device


# --- what a step is made of, and what comes of it -------------------------------------------------------------------------
@dataclass(frozen=True)
class Batch:
    """The pairs of one optimizer step, in the plan's order, over all processes."""

    index: int  # of the optimizer step within the inner epoch
    sample_index: Tensor  # [n] int64
    step_index: Tensor  # [n] int64, columns of the trajectory
    own: Tensor  # [m] int64, which of the n pairs this process computes for the policy

    def __len__(self) -> int:
        return len(self.sample_index)


@dataclass(frozen=True)
class PolicyPart:
    """The policy's pairs of this process, under the weights before the step."""

    log_probs: Tensor  # [m] float32
    log_ratios: Tensor  # [m] float32, log p - log p_old
    ratios: Tensor  # [m] float32
    losses: Tensor  # [m] float64, without the KL term
    clipped: Tensor  # [m] bool
    kl: Tensor  # [m] float32, distance from the reference before its coefficient; 0 where update.kl_coef is 0


@dataclass(frozen=True)
class CriticPart:
    """All pairs of the batch: every process computes the whole critic."""

    values: Tensor  # [n] float32, the critic in training (dropout on)
    losses: Tensor  # [n] float64
    clipped: Tensor  # [n] bool


@dataclass(frozen=True)
class Outcome:
    """What became of the gradients."""

    policy_grad_norm: Tensor  # [] before clipping
    critic_grad_norm: Tensor | None
    skipped: bool  # a loss or gradient was not finite, no weight has moved
    overflowed: bool  # fp16 loss scale too large: not a fault, the policy's step was left out


@dataclass(frozen=True)
class Step:
    """One optimizer step, as an observer sees it."""

    batch: Batch
    policy: PolicyPart
    critic: CriticPart | None
    outcome: Outcome


class Observer:
    """Is called while the update runs: progress bars, tests and traces. Does nothing by itself."""

    def before_step(self, batch: Batch) -> None:
        """Weights as they are before the step."""

    def gradients(self, index: int) -> None:
        """Gradients of the whole global batch are in `.grad`, unscaled, not clipped yet."""

    def after_step(self, step: Step) -> None:
        """Weights and optimizer states as they are after the step."""


@dataclass(frozen=True)
class _Material:
    """What an inner epoch trains on. Small columns are on the policy's device, latents where they arrived."""

    samples: Trajectory
    latents: sharing.Latents
    credit: Credit
    inner: int


# --- the learner --------------------------------------------------------------------------------------------------------
class Learner:
    """Trains policy and critic on an epoch's samples. Several processes share the policy's work, each computes the whole critic."""

    def __init__(
        self, policy: Policy, critic: Critic | None, optimizers: Optimizers, preset: Preset, randomness: Randomness, plan: Plan, world: World
    ):  # fmt: skip
        self.policy, self.critic, self.optimizers = policy, critic, optimizers
        self.preset, self.randomness, self.plan, self.world = preset, randomness, plan, world

    def inner_epoch(self, samples: Trajectory, credit: Credit, order: ShufflePlan, inner: int, observer: Observer) -> list[Step]:
        """Walk the order, one optimizer step per effective batch."""
        settings, device, steps = self.preset.update, self.policy.device, []
        latents = sharing.latents_of(samples, order, settings.batch_size, self.world)
        material = _Material(_on_device(samples, device), latents, _on_device(credit, device), inner)
        pairs = order.optimizer_steps(settings.batch_size, self.preset.all_timesteps)
        for index, (sample_index, step_index) in enumerate(pairs):
            own = own_pairs(len(sample_index), settings.batch_size, self.world.share(settings.batch_size))
            batch = Batch(index, sample_index, step_index, own)
            observer.before_step(batch)
            steps.append(self._step(material, batch, observer))
            observer.after_step(steps[-1])
        return steps

    def _step(self, material: _Material, batch: Batch, observer: Observer) -> Step:
        self.optimizers.policy.zero_grad(set_to_none=True)
        policy_part = self._policy_backward(material, batch)
        self.world.sum_gradients(self.policy.trainable.values())
        critic_part = None
        if self.critic is not None:
            critic_part = self._critic_backward(material, batch)
        self.optimizers.scaler.unscale_(self.optimizers.policy)
        observer.gradients(batch.index)
        outcome = self._apply(policy_part.losses + policy_part.kl)
        if self.critic is not None and not outcome.skipped:
            self._more_critic_steps(material, batch)
        return Step(batch, policy_part, critic_part, outcome)

    def _policy_backward(self, material: _Material, batch: Batch) -> PolicyPart:
        """Accumulate the gradient of this process' part of the mean over the batch."""
        samples, columns = batch.sample_index[batch.own], batch.step_index[batch.own]
        if not len(samples):  # more processes than rows
            empty = torch.zeros(0, device=self.policy.device)
            return PolicyPart(empty, empty, empty, empty.double(), empty.bool(), empty)
        parts, size, kl_coef = [], self.plan.micro_batch, self.preset.update.kl_coef
        for sample, column in zip(samples.split(size), columns.split(size), strict=True):
            part = self._policy_pairs(material, sample, column)
            losses = part.losses + kl_coef * part.kl if kl_coef > 0 else part.losses
            self.optimizers.scaler.scale(losses.sum() / len(batch)).backward()
            parts.append(PolicyPart(**{name: value.detach() for name, value in vars(part).items()}))
        return PolicyPart(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def _policy_pairs(self, material: _Material, sample: Tensor, column: Tensor) -> PolicyPart:
        """Score recorded transitions again under the current weights. sample, column [b]"""
        recorded, device = material.samples, self.policy.device
        guidance = self.preset.rollout.guidance_scale if self.preset.update.guidance else 1.0
        x_t, x_next = (material.latents.states(sample, column + next_, device) for next_ in (0, 1))
        noise = self._noise(recorded, sample, column, x_t.shape[1:]) if self.preset.guard else None
        sample, column = send(sample, device), send(column, device)
        inputs = x_t, recorded.steps[column], recorded.texts, recorded.text_rows[sample], guidance
        transition = self.policy.transition(*inputs)
        log_probs = transition.log_prob(x_next)
        log_ratios = log_probs - recorded.log_probs[sample, column]
        ratios = (log_ratios if noise is None else guarded_log_ratio(transition, x_next, noise)).exp()
        losses, clipped = policy_loss(ratios, material.credit.advantages[sample, column], self.preset.update.clip_range)
        kl = self._reference_kl(transition, inputs) if self.preset.update.kl_coef > 0 else torch.zeros_like(log_probs)
        return PolicyPart(log_probs, log_ratios, ratios, losses, clipped, kl)

    def _reference_kl(self, transition: Transition, inputs: tuple) -> Tensor:
        """Distance of the steps from those of the weights before training. -> [b]"""
        kind = self.preset.update.kl_kind
        with torch.no_grad():
            reference = self.policy.transition(*inputs, reference=True)
        return reference_kl(kind, transition, reference, self.policy.sampler.diffusion[inputs[1]] if kind == "flow-grpo" else None)

    def _noise(self, recorded: Trajectory, sample: Tensor, column: Tensor, shape: Sequence[int]) -> Tensor:
        """The z of each pair, drawn once more as in the rollout. -> [b,*shape]"""
        steps, ids = recorded.steps.tolist(), recorded.sample_ids.tolist()
        pairs = zip(sample.tolist(), column.tolist(), strict=True)
        drawn = [self.randomness.step_noise(recorded.epoch, steps[j], [ids[i]], shape) for i, j in pairs]
        return send(torch.cat(drawn), self.policy.device)

    def _critic_backward(self, material: _Material, batch: Batch, repeat: int = 0) -> CriticPart:
        """The critic is tiny: every process computes the whole batch on an identical replica."""
        self.optimizers.critic.zero_grad(set_to_none=True)
        recorded, device = material.samples, self.critic.layers[0].weight.device
        masks = _keep_masks(self.randomness, self.preset, recorded.epoch, material.inner, batch, repeat)
        sample, column = send(batch.sample_index, device), send(batch.step_index, device)
        values = self.critic(recorded.image_embeds[sample, column], None if masks is None else [send(mask, device) for mask in masks])
        returns = material.credit.returns[sample, column]
        losses, clipped = critic_loss(values, recorded.values[sample, column], returns, self.preset.update.clip_range_critic)
        (self.preset.algorithm.critic_coef * losses.mean()).backward()
        return CriticPart(values.detach(), losses.detach(), clipped)

    def _more_critic_steps(self, material: _Material, batch: Batch) -> None:
        """`algorithm.critic_steps` beyond the published one, on the same batch with fresh dropout; not finite: left out."""
        for repeat in range(1, self.preset.algorithm.critic_steps):
            self._critic_backward(material, batch, repeat)
            if torch.nn.utils.clip_grad_norm_(list(self.critic.parameters()), self.preset.update.max_grad_norm).isfinite():
                self.optimizers.critic.step()

    def _apply(self, losses: Tensor) -> Outcome:
        """Clip each network's gradient separately and step; `losses` are the policy's of this process."""
        clip, max_norm, scaler = torch.nn.utils.clip_grad_norm_, self.preset.update.max_grad_norm, self.optimizers.scaler
        policy_norm = clip(list(self.policy.trainable.values()), max_norm)
        critic_norm = None if self.critic is None else clip(list(self.critic.parameters()), max_norm)
        policy_finite = bool(policy_norm.isfinite())
        critic_finite = critic_norm is None or bool(critic_norm.isfinite())
        overflowed = False
        if scaler.is_enabled() and not policy_finite and critic_finite:
            # finite losses whose scaled gradients are not: the scale was too large. Otherwise it is a fault, as in fp32
            overflowed = bool(self.world.sum((~losses.isfinite()).sum().float()) == 0)
        skipped = not overflowed and not (policy_finite and critic_finite)
        if not skipped:
            scaler.step(self.optimizers.policy)  # leaves the step out if the scaled gradients overflowed
            if self.optimizers.critic is not None:
                self.optimizers.critic.step()
            if self.optimizers.average is not None and not overflowed:
                self.optimizers.average.update()
        if scaler.is_enabled():
            scaler.update()
        return Outcome(policy_norm, critic_norm, skipped, overflowed)


def own_pairs(count: int, batch_rows: int, share: slice) -> Tensor:
    """Which of a batch's `count` pairs belong to the rows of `share`. Pairs go column by column, `batch_rows` in each. -> [m] int64

    Cut by rows first, so that a process trains on the same few samples at all their steps.
    """
    return torch.arange(count).view(-1, batch_rows)[:, share].reshape(-1)


def _on_device(record: Trajectory | Credit, device: torch.device) -> Trajectory | Credit:
    """The small columns on the device, once and not at every micro-step; latents stay where they are."""
    columns = {name: value for name, value in vars(record).items() if isinstance(value, Tensor) and name not in WHERE_THEY_ARE}
    if isinstance(record, Trajectory):
        columns["texts"] = record.texts
    return replace(record, **{name: value.to(device) if isinstance(value, Conditioning) else send(value, device) for name, value in columns.items()})


def _keep_masks(randomness: Randomness, preset: Preset, epoch: int, inner: int, batch: Batch, repeat: int) -> Sequence[Tensor] | None:
    """The critic's dropout in one optimizer step; None without dropout."""
    if not preset.algorithm.critic_dropout:
        return None
    return randomness.keep_masks(epoch, inner, batch.index, len(batch), WIDTHS[: len(DROPOUT)], DROPOUT, repeat)
