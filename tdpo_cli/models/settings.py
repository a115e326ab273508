"""Settings that depend on the kind of model: what does not apply is refused, what is not set is the family's own. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tdpo_cli import models
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.models import FamilyEntry

ETA = 1.0  # of DDIM
CRITIC_STATE = {"ddim": "x_t", "flow": "x0"}  # by diffusion: as published; most states of a flow trajectory decode to noise
FLOW_DYNAMICS, NOISE_LEVEL = "flow-sde", 0.7  # Flow-GRPO's


def entry_of(preset: Preset) -> FamilyEntry:
    """The family of the preset's model; a hub id's model_index.json is downloaded. Raises RequestError."""
    return models.family_of(models.resolve(preset.model.base), preset.model.revision)


def local_entry(preset: Preset) -> FamilyEntry | None:
    """The family of a model on this disk. None: unknown until downloaded. Raises RequestError."""
    return entry_of(preset) if Path(models.resolve(preset.model.base)).exists() else None


def fit(preset: Preset, entry: FamilyEntry) -> Preset:
    """The preset with the family's own noise and critic's state where it gives none. Raises RequestError for a setting of another kind of family."""
    check_model(preset.model, entry)
    if preset.has_critic and preset.algorithm.critic_view == "tiny" and not entry.tiny_vae:
        raise RequestError(
            f"algorithm.critic_view tiny: no AutoencoderTiny exists for the latents of {entry.title}. Use --set algorithm.critic_view=decode or rgb."
        )
    if preset.has_critic and preset.algorithm.critic_state is None:
        preset = replace(preset, algorithm=replace(preset.algorithm, critic_state=CRITIC_STATE[entry.diffusion]))
    rollout = preset.rollout
    if entry.diffusion == "ddim":
        wrong = {
            "dynamics": rollout.dynamics not in (None, "ddim"),
            "noise_level": rollout.noise_level is not None,
            "window": rollout.window is not None,
        }
        _refuse(wrong, f"for flow-matching models; {entry.title} is sampled with DDIM, whose noise is rollout.eta.")
        if preset.update.kl_kind == "flow-grpo":
            raise RequestError(f"update.kl_kind flow-grpo is for flow-matching models; with {entry.title}: --set update.kl_kind=gaussian")
        return replace(preset, rollout=replace(rollout, eta=ETA if rollout.eta is None else rollout.eta))
    wrong = {"eta": rollout.eta is not None, "dynamics": rollout.dynamics == "ddim"}
    _refuse(wrong, f"for DDIM; {entry.title} is a flow-matching model, whose noise is rollout.noise_level.")
    dynamics = rollout.dynamics or FLOW_DYNAMICS
    level = NOISE_LEVEL if rollout.noise_level is None else rollout.noise_level
    return replace(preset, rollout=replace(rollout, dynamics=dynamics, noise_level=level))


def check_model(model: Model, entry: FamilyEntry) -> None:
    """RequestError for a setting of another family."""
    if model.drop_t5 and not entry.optional_t5:
        raise RequestError(f"model.drop_t5 is for Stable Diffusion 3; {entry.title} needs all its text encoders: --set model.drop_t5=false")


def _refuse(wrong: dict[str, bool], reason: str) -> None:
    for key in (key for key, is_wrong in wrong.items() if is_wrong):
        raise RequestError(f"rollout.{key} is {reason} Leave it out: --set rollout.{key}=none")
