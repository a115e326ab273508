"""Settings that must fit each other."""

from __future__ import annotations

import math
from typing import Any

from tdpo_cli.config.fields import SettingError, named, suggest
from tdpo_cli.config.settings import TRACKERS, TRUE_REWARDS, Preset, Reward, Rollout
from tdpo_cli.errors import holds_password


def check(preset: Preset, where: str) -> Preset:
    """Settings that must fit each other. Raises SettingError; returns the preset."""
    samples, batch = preset.rollout.samples_per_epoch, preset.update.batch_size
    if samples % batch:
        fits = [n for n in range(1, samples + 1) if samples % n == 0]
        nearest = sorted(sorted(fits, key=lambda n: abs(n - batch))[:4])
        raise SettingError(
            f"{where}: update.batch_size {batch} does not divide rollout.samples_per_epoch {samples}. These would: {', '.join(map(str, nearest))}."
        )
    _check_noise(preset.rollout, where)
    if preset.trained_steps < 1:
        steps = preset.stochastic_steps
        if steps < 1:
            raise SettingError(f"{where}: rollout.steps {preset.rollout.steps}: the last step of a flow model is not trained, so give at least 2.")
        raise SettingError(
            f"{where}: update.timestep_fraction {preset.update.timestep_fraction} of {steps} steps selects no step. "
            f"Use at least {math.ceil(10_000 / steps) / 10_000:g}."  # rounded up: 49 x (1/49) is below 1
        )
    group = preset.group_size
    if group is not None and samples % group:
        raise SettingError(
            f"{where}: rollout.images_per_prompt {group} does not divide rollout.samples_per_epoch {samples}: groups must be whole. "
            f"These would: {', '.join(str(n) for n in range(2, samples + 1) if samples % n == 0) or 'none'}."
        )
    if preset.has_critic and preset.algorithm.critic_view == "tiny" and preset.model.tiny_vae is None:
        raise SettingError(
            f"{where}: algorithm.critic_view tiny needs model.tiny_vae, an AutoencoderTiny made for this model's latents (for Stable Diffusion "
            "madebyollin/taesd, for SDXL madebyollin/taesdxl): --set model.tiny_vae=PATH"
        )
    for tracker in preset.run.trackers:
        if tracker not in TRACKERS:
            close = suggest(tracker, TRACKERS)
            raise SettingError(f"{where}: run.trackers: unknown tracker {named(tracker)!r}.{close} Known: {', '.join(TRACKERS)}.")
    if preset.reward.min_count > preset.reward.buffer_size:
        raise SettingError(
            f"{where}: reward.min_count {preset.reward.min_count} is never reached with reward.buffer_size {preset.reward.buffer_size}."
        )
    if any(map(holds_password, (*preset.rewards, *preset.reward.checkpoints, *preset.reward.checkpoints.values()))):
        raise SettingError(f"{where}: a reward's address holds no user or password, as it is written into files.")
    twice = {name for name in preset.rewards if preset.rewards.count(name) > 1}
    if twice:
        raise SettingError(f"{where}: reward {min(twice)!r} is named twice in reward.train and reward.watch.")
    _check_several(preset, where)
    _check_quantised(preset, where)
    return preset


def _check_quantised(preset: Preset, where: str) -> None:
    """Quantised weights are frozen: something else must train, and be the difference to the reference."""
    kind = preset.model.quantise
    if kind is None:
        return
    if preset.model.lora_rank == 0:
        also = f" update.kl_coef {preset.update.kl_coef:g} needs it too: the base without its LoRA is the reference." if preset.update.kl_coef else ""
        raise SettingError(
            f"{where}: model.quantise {kind} freezes the network, and model.lora_rank 0 trains all of it. Train a LoRA: "
            f"--set model.lora_rank=4, or --set model.quantise=none.{also}"
        )
    if preset.run.shard == "on":
        raise SettingError(
            f"{where}: run.shard on splits the weights that model.quantise {kind} packs, which was never tested. A quantised network is a quarter "
            "or half as large: --set run.shard=off, or --set model.quantise=none."
        )


def _check_several(preset: Preset, where: str) -> None:
    """Constraints, and several rewards that train together."""
    reward = preset.reward
    for name in reward.at_least:
        if name in TRUE_REWARDS:
            raise SettingError(f"{where}: reward.at_least.{name}: {name} is the truth that a run is judged by. It can never be a constraint.")
        if name in preset.weights:
            raise SettingError(f"{where}: reward.at_least.{name}: {name} trains, so it rises anyway. Constrain a reward that does not train.")
    rates = {key: getattr(reward, key) for key in ("constraint_rate", "constraint_max")}
    for key, value in rates.items() if not reward.at_least else ():
        if value != getattr(Reward(), key):
            raise SettingError(f"{where}: reward.{key} {value:g} does nothing without a constraint. Add one: --set reward.at_least.NAME=-0.2")
    key = "algorithm.advantage_std" if preset.algorithm.facts.groups else "reward.normalise"
    if len({*preset.weights, *reward.at_least}) > 1 and _value(preset, key) == "none":
        raise SettingError(
            f"{where}: {key} none leaves {', '.join([*preset.weights, *reward.at_least])} on scales of their own, which cannot be added. "
            f"Choose another {key}, or train on one reward without constraints."
        )


def _value(preset: Preset, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(preset, section), name)


def _check_noise(rollout: Rollout, where: str) -> None:
    """What contradicts itself whatever the model is."""
    flow = {"dynamics": rollout.dynamics not in (None, "ddim"), "noise_level": rollout.noise_level is not None, "window": rollout.window is not None}
    given = [f"rollout.{key}" for key, is_given in flow.items() if is_given]
    for key in ("eta",) if rollout.eta is not None else ("dynamics",) if rollout.dynamics == "ddim" else ():
        if given:
            raise SettingError(
                f"{where}: rollout.{key} {getattr(rollout, key)} is for DDIM and {given[0]} for flow-matching models. "
                f"Leave one out: --set rollout.{key}=none or --set {given[0]}=none"
            )
    if rollout.window is None:
        return
    size, first, last = rollout.window
    last = rollout.steps - 1 if last == -1 else last
    if not 0 <= first < last <= rollout.steps:
        raise SettingError(f"{where}: rollout.window: first {first} and last {last} must be 0 <= first < last <= rollout.steps {rollout.steps}.")
    if not 1 <= size <= last - first:
        raise SettingError(f"{where}: rollout.window of {size} steps must be at least 1 and fit into the {last - first} steps {first} .. {last - 1}.")
