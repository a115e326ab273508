"""Everything a training run is made of: built once from a preset, saved and restored as one state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tdpo_cli import algorithms, models
from tdpo_cli.algorithms.base import Algorithm
from tdpo_cli.algorithms.combination import Combination
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import prompts
from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import memory, sharding
from tdpo_cli.machine.world import World, may_download
from tdpo_cli.models import loading, settings
from tdpo_cli.models.embedding_store import Store, place
from tdpo_cli.models.embeddings import Embeddings
from tdpo_cli.models.family import Family
from tdpo_cli.models.policy import Policy
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards import Reward, scoring
from tdpo_cli.rewards import checkpoints as reward_checkpoints
from tdpo_cli.rewards.backbones import Backbones, ImageEncoder
from tdpo_cli.rewards.critic_encoder import critic_encoder
from tdpo_cli.sandbox import is_embedded
from tdpo_cli.train import views
from tdpo_cli.train.average import Average
from tdpo_cli.train.rollout import draw_prompts

Turn = Callable[[], contextlib.AbstractContextManager]


@dataclass
class Optimizers:
    policy: torch.optim.Optimizer
    critic: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler  # does nothing unless the policy computes in fp16
    average: Average | None = None  # of the policy's weights, where update.ema_decay is above 0

    def averaged(self) -> contextlib.AbstractContextManager:
        """Inside, the policy computes with what a checkpoint holds: the average where there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()


@dataclass
class Job:
    """Everything a run is made of. Built once; the epochs move its weights and count its steps."""

    preset: Preset
    world: World
    policy: Policy
    rewards: dict[str, Reward]
    encoder: ImageEncoder | None
    critic: Critic | None
    optimizers: Optimizers
    algorithm: Algorithm
    randomness: Randomness
    prompts: list[str]
    plan: memory.Plan
    backbones: Backbones = field(default_factory=Backbones)
    view: views.View | None = None  # without a critic
    combination: Combination = field(init=False)  # what the rewards come to
    updates: int = 0  # optimizer steps that were not skipped
    bad_steps: int = 0  # that were skipped

    def __post_init__(self) -> None:
        self.combination = Combination(self.preset)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "policy_optimizer": self.optimizers.policy.state_dict(),
            "scaler": self.optimizers.scaler.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "critic_optimizer": self.optimizers.critic.state_dict() if self.critic else None,
            "algorithm": self.algorithm.state_dict(),
            "combination": self.combination.state_dict(),
            **({"average": self.optimizers.average.state_dict()} if self.optimizers.average else {}),
            "updates": self.updates,
            "bad_steps": self.bad_steps,
            "view": self.view.state_dict() if self.view else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizers.policy.load_state_dict(state["policy_optimizer"])
        if state["scaler"]:  # empty where the run so far did not compute in fp16 (a CPU)
            self.optimizers.scaler.load_state_dict(state["scaler"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
            self.optimizers.critic.load_state_dict(state["critic_optimizer"])
        if state.get("view"):  # what was fitted on the untrained policy; on another machine the last bits would be others
            self.view.load_state_dict(state["view"])
        if self.optimizers.average:
            self.optimizers.average.load_state_dict(state["average"])
        self.algorithm.load_state_dict(state["algorithm"])
        if "combination" in state:  # since version 0.2
            self.combination.load_state_dict(state["combination"])
        self.updates, self.bad_steps = state["updates"], state["bad_steps"]


def build(
    preset: Preset, world: World, plan: memory.Plan, say: Callable[[str], None] = lambda text: None, turn: Turn = contextlib.nullcontext
) -> Job:
    """Load the networks and set up what trains; `say` is told what takes long. Raises RequestError for what the preset names and is not there.

    Files are read inside `turn()`, which may let one process go first. No network that processes share is called there.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = preset.model.tf32
    randomness = Randomness(preset.run.seed)
    encoder = critic = view = None
    with turn():
        prompt_list = prompts.load(preset.rollout.prompts)
        policy = models.load(
            preset.model, device=world.device, negative_prompt=preset.rollout.negative_prompt,
            keep_reference=preset.needs_reference, randomness=randomness,
            placing=loading.Placing(sharding.of(preset, world), kept_embeddings(preset, world, prompt_list, say)),
        )  # fmt: skip
        preset = set_schedule(policy, settings.fit(preset, settings.entry_of(preset)), randomness)
        policy.cut_up(plan.checkpointing, preset.run.compile)
        if preset.group_size is not None:
            prompt_list = distinct_prompts(policy.family, prompt_list, preset)
        backbones = Backbones(world.device)
        if plan.park:
            backbones.park()  # each network is on the device only while it is used
        checkpoints = reward_checkpoints(preset.reward.zoo, preset.reward.checkpoints)
        rewards = scoring.load_rewards(preset.rewards, backbones, checkpoints)
        if preset.has_critic:
            encoder = critic_encoder(preset.reward.train, backbones, checkpoints)
            view = views.make(policy, preset)
    if preset.has_critic:
        view = view or views.rgb(policy, preset, prompt_list, plan)
        critic = Critic(encoder.embed_dim, preset.algorithm.critic_init_std, preset.algorithm.critic_activation, preset.critic_beside)
        critic.initialise(randomness.initial_weights("critic"))
        critic.to(world.device)
    optimizers = make_optimizers(policy, critic, preset)
    return Job(
        preset, world, policy, rewards, encoder, critic, optimizers, algorithms.make(preset), randomness, prompt_list,
        plan, backbones, view=view,
    )  # fmt: skip


def kept_embeddings(preset: Preset, world: World, prompt_list: list[str], say: Callable[[str], None]) -> Embeddings | None:
    """Where the embeddings of the prompts that this run will use are kept; None for an embedded model, whose text encoders are tiny."""
    if is_embedded(preset.model.base):
        return None
    limit = 0 if preset.run.cache_limit == "none" else memory.parse_size("run.cache_limit", preset.run.cache_limit, ", or none")
    # inside build, one process of each machine goes first already where the hub may be asked
    turn = contextlib.nullcontext if may_download() else world.first_on_each_machine
    say = say if world.is_main else lambda text: None
    return Embeddings(Store(place()), limit, lambda family: run_prompts(preset, prompt_list, family), turn, say)


def run_prompts(preset: Preset, prompt_list: list[str], family: Family) -> list[str]:
    """The prompts that a run of the preset will use: drawn in any epoch, shown in previews, or what a critic's view is fitted on."""
    randomness = Randomness(preset.run.seed)
    choices = prompt_list if preset.group_size is None else distinct_prompts(family, prompt_list, preset)
    used = dict.fromkeys(choices[: max(1, preset.run.preview_images)])
    if preset.has_critic and preset.algorithm.critic_view == "rgb":
        used |= dict.fromkeys(views.fitted_prompts(preset, choices))
    for epoch in range(preset.run.epochs):
        if len(used) == len(set(choices)):
            break
        used |= dict.fromkeys(draw_prompts(preset, randomness, epoch, choices))
    return list(used)


def distinct_prompts(family: Family, prompt_list: list[str], preset: Preset) -> list[str]:
    """The first of the prompts that the text encoder reads alike. Raises RequestError unless every group of an epoch can have its own."""
    forms: dict[str, str] = {}
    for prompt in prompt_list:
        forms.setdefault(family.normal_form(prompt), prompt)
    samples, size = preset.rollout.samples_per_epoch, preset.group_size
    if samples // size > len(forms):
        raise RequestError(
            f"rollout.samples_per_epoch {samples} in groups of {size} (rollout.images_per_prompt) needs {samples // size} distinct prompts an "
            f"epoch; {preset.rollout.prompts} has {len(forms)}. Use larger groups, fewer samples or more prompts."
        )
    return list(forms.values())


def set_schedule(policy: Policy, preset: Preset, randomness: Randomness, epoch: int = 0) -> Preset:
    """Set an epoch's denoising steps; with a window, one drawn from (seed, epoch). -> the preset with the window that cps needs

    Without one, cps trains the steps before the noise becomes tiny. Which these are is known once the model is. Raises RequestError.
    """
    rollout = preset.rollout
    noise, window = rollout.eta if rollout.noise_level is None else rollout.noise_level, None
    if rollout.window is not None:
        size, first, last = rollout.window
        last = rollout.steps - 1 if last == -1 else last
        window = first + randomness.window(epoch, last - first - size + 1), size
    policy.set_schedule(rollout.steps, noise, rollout.dynamics, window)
    if rollout.dynamics != "cps" or window is not None:
        return preset
    trained = int(policy.stochastic.sum())
    policy.set_schedule(rollout.steps, noise, rollout.dynamics, (0, trained))
    return replace(preset, rollout=replace(rollout, window=(trained, 0, trained)))


def make_optimizers(policy: Policy, critic: Critic | None, preset: Preset) -> Optimizers:
    settings, device = preset.update, policy.device
    options = dict(betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon, weight_decay=settings.adam_weight_decay)
    policy_class = torch.optim.AdamW
    if settings.optimizer == "adamw-8bit":
        policy_class = _adamw_8bit()
    elif device.type == "cuda":
        options["fused"] = True
    half = preset.model.dtype == "fp16" and device.type != "cpu"
    return Optimizers(
        policy=policy_class(list(policy.trainable.values()), lr=settings.learning_rate, **options),
        critic=None if critic is None else torch.optim.AdamW(
            critic.parameters(), lr=settings.critic_learning_rate, **{k: v for k, v in options.items() if k != "fused"}
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=half),
        average=Average(list(policy.trainable.values()), settings.ema_decay, settings.ema_every) if settings.ema_decay > 0 else None,
    )  # fmt: skip


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RequestError("update.optimizer adamw-8bit needs bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit
