"""What a run is: every setting with its default, unit and range, and what follows from them.

Presets state global numbers (samples per epoch, effective batch); how the work is cut up for a machine never changes
the result. Standard library only, so that `--help` and `--dry-run` stay instant.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tdpo_cli.algorithms import ALGORITHMS, Facts
from tdpo_cli.config.fields import knob, type_name

AlgorithmName = Literal[tuple(ALGORITHMS)]


@dataclass(frozen=True)
class Model:
    base: str = knob("CompVis/stable-diffusion-v1-4", "diffusers folder, hub id, `sandbox` or `sandbox-flow`")
    revision: str | None = knob(None, "branch, tag or commit of a hub id")
    start_from: str | None = knob(None, "checkpoint folder, run or LoRA file whose weights training starts from")
    lora_rank: int = knob(4, "rank of the LoRA; 0 trains the whole denoising network", at_least=0)
    lora_alpha: float | None = knob(None, "a new LoRA's contribution is multiplied by alpha / rank; default the rank", above=0)
    lora_targets: tuple[str, ...] | None = knob(None, "suffixes of the module names that get a LoRA; default the family's attention")
    text_lora: Literal["refuse", "fuse"] = knob("refuse", "text-encoder weights in the LoRA of start_from: an error, or part of the frozen base")
    vae: str | None = knob(None, "another VAE: a folder or hub id; default the base model's")
    vae_tiling: bool = knob(False, "decode large images in overlapping tiles: less memory, and slightly other pixels, so rewards change too")
    tiny_vae: str | None = knob(None, "the AutoencoderTiny of algorithm.critic_view tiny: a folder or hub id made for this model's latents")
    allow_distilled: bool = knob(False, "train a model that was distilled to few steps all the same")
    dtype: Literal["fp32", "fp16", "bf16"] = knob("fp16", "of the networks on a GPU; a CPU computes in fp32")
    quantise: Literal["nf4", "int8"] | None = knob(
        None, "frozen weights of the denoiser, T5 and Qwen in 4 bits (a GPU and the extra `nf4`) or 8 bits (the extra `int8`); the LoRA stays fp32"
    )
    resolution: tuple[int, int] | None = knob(None, "pixels: a number, or [height, width]; default the model's own", at_least=8)
    drop_t5: bool = knob(False, "Stable Diffusion 3: leave out its third text encoder, T5, which needs the most memory")
    tf32: bool = knob(True, "allow TF32 matrix products on a GPU")


@dataclass(frozen=True)
class Rollout:
    prompts: str = knob("simple-animals", "training prompts: a built-in list, a .txt/.jsonl/.csv file")
    eval_prompts: str | None = knob(None, "held-out prompts for cross-eval")
    samples_per_epoch: int = knob(256, "images sampled and scored per epoch, over all processes", at_least=1, at_most=1_000_000)
    images_per_prompt: int | None = knob(None, "grpo: images of each prompt, which are one group; divides samples_per_epoch; default 8", at_least=2)
    steps: int = knob(50, "denoising steps per image", at_least=1, at_most=1000)
    guidance_scale: float = knob(5.0, "classifier-free guidance; 1 or less is off", at_least=0)
    eta: float | None = knob(None, "DDIM noise; a policy gradient needs some", above=0, at_most=1)
    dynamics: Literal["ddim", "cps", "flow-sde", "dance-sde"] | None = knob(
        None, "how a step adds noise: ddim, or one of the others for flow-matching models; default the family's own (ddim with eta 1, or flow-sde)"
    )
    noise_level: float | None = knob(None, "noise of a flow-matching step; default 0.7 with flow-matching models", above=0, at_most=2)
    window: tuple[int, int, int] | None = knob(
        None,
        "flow matching: [size, first, last]: only `size` steps in a row have noise and are trained, drawn anew every epoch from the steps "
        "first .. last - 1; a number is [size, 0, steps - 1]; default all but the last step",
    )
    negative_prompt: str = knob("", "what the unconditional half of guidance sees")


@dataclass(frozen=True)
class Sampling:
    steps: int | None = knob(None, "denoising steps of shown images: sample, previews, cross-eval; default the rollout's", at_least=1, at_most=1000)
    guidance_scale: float | None = knob(None, "guidance of shown images; default the rollout's", at_least=0)
    noise: float | None = knob(
        None, "eta (DDIM) or noise level (flow) of shown images, 0 is deterministic; default the rollout's with DDIM, 0 with flow models", at_least=0
    )


@dataclass(frozen=True)
class Reward:
    train: str = knob("aesthetic", "the reward that trains: a name, `module:function` or `file.py:function`")
    train_weights: dict[str, float] = knob(
        {}, "several training rewards: name -> weight. Each is normalised before it is weighted; reward.train is then the first", above=0
    )
    watch: tuple[str, ...] = knob((), "rewards scored every epoch that never train")
    at_least: dict[str, float] = knob(
        {}, "constraints: name of a watched reward -> how far its mean may change, in standard deviations of epoch 0 (-0.2: fall by at most 0.2)"
    )
    constraint_rate: float = knob(0.1, "how fast a constraint's multiplier rises while it is violated; it falls a tenth as fast", above=0)
    constraint_max: float = knob(5.0, "largest multiplier of a constraint; the training reward's own is 1", above=0)
    zoo: Literal["sandbox"] | None = knob(None, "take reward checkpoints from an embedded set")
    checkpoints: dict[str, str] = knob({}, "reward name -> local path or hub id")
    normalise: Literal["per-prompt", "global", "none"] = knob("per-prompt", "statistics that standardise the training reward")
    scale_only: bool = knob(False, "divide by the standard deviation without subtracting the mean")
    buffer_size: int = knob(32, "per-prompt: how many recent rewards of a prompt are remembered", at_least=1)
    min_count: int = knob(16, "per-prompt: with fewer, the statistics of the whole epoch are used", at_least=1)
    clip_range: float = knob(0.0, "clip the normalised reward to +- this; 0 is off", at_least=0)


@dataclass(frozen=True)
class Algorithm:
    name: AlgorithmName = knob("tdpo-r", "ddpo and grpo have no critic; tdpo-r is tdpo with neuron resets")
    gamma: float = knob(1.0, "discount per denoising step", at_least=0, at_most=1)
    advantage_norm: Literal["global", "per-prompt", "none"] = knob("global", "statistics that standardise the advantages (tdpo, tdpo-r)")
    advantage_std: Literal["group", "epoch", "none"] = knob(
        "group", "grpo: standard deviation that the advantages are divided by: of the prompt's rewards, of all of the epoch, or not at all (Dr. GRPO)"
    )
    advantage_clip: float = knob(5.0, "grpo: clip the advantages to +- this; 0 is off", at_least=0)
    guard: bool = knob(False, "grpo: GRPO-Guard's ratio, centred at 1 and of equal spread at every step; its clip range is another")
    critic_coef: float = knob(1.0, "weight of the critic loss", at_least=0)
    critic_dropout: bool = knob(True, "dropout 0.2, 0.2, 0.1 behind the critic's first three layers while it trains")
    critic_activation: Literal["none", "relu"] = knob("none", "between the critic's layers; the published critic has none, so it is linear")
    critic_steps: int = knob(1, "optimizer steps of the critic per optimizer step of the policy, on the same batch; 1 is published", at_least=1)
    critic_init_std: float | None = knob(None, "standard deviation of the critic's initial and reset weights; default 1/(E+1)", above=0)
    critic_state: Literal["x_t", "x0"] | None = knob(
        None, "what the critic sees of step k: the state x_t before it, as published, or the clean image x0 predicted from it, with k/T beside; "
        "default the family's own (x_t with DDIM, x0 with flow matching)",
    )  # fmt: skip
    critic_view: Literal["decode", "tiny", "rgb"] = knob(
        "decode", "how the critic's pictures are made of latents: by the VAE, as published; by model.tiny_vae; or by a linear map to colours, "
        "fitted at the start. The last two are faster and another algorithm",
    )  # fmt: skip
    reset_every: int = knob(10, "tdpo-r: epochs between neuron resets", at_least=1)
    reset_target: Literal["active", "dormant", "all", "none"] = knob("active", "tdpo-r: which neurons are re-initialised (dormant is ReDo)")
    dormant_threshold: float = knob(0.0, "a neuron whose normalised activation is at most this counts as dormant", at_least=0)
    extra_dormant_threshold: float | None = knob(None, "a second threshold, logged only", at_least=0)
    neuron_rows: int = knob(64, "samples whose activations tell dormant neurons from active ones", at_least=1)
    reference: bool = knob(False, "score every step under the initial policy too, to log the KL")
    kl_penalty: Literal["kl", "abs", "square", "clip", "approx", "js"] = knob("clip", "estimator of the per-step KL penalty")
    kl_penalty_coef: float = knob(0.0, "weight of the KL penalty, on top of the controller's beta; 0 is off", at_least=0)
    init_kl_coef: float = knob(0.2, "initial (or fixed) beta of the KL controller", at_least=0)
    kl_target: float | None = knob(
        None, "mean KL that an adaptive controller steers to while kl_penalty_coef is above 0; without it beta is fixed", above=0
    )
    kl_horizon: int = knob(2000, "samples over which the adaptive controller acts", at_least=1)
    update_mode: Literal["per-timestep", "all-timesteps"] = knob(
        "per-timestep", "one optimizer step per batch and timestep slot, or (ddpo, grpo) gradients accumulated over all timesteps"
    )

    @property
    def facts(self) -> Facts:
        return ALGORITHMS[self.name]


@dataclass(frozen=True)
class Update:
    batch_size: int = knob(128, "samples per optimizer step, over all processes; divides samples_per_epoch", at_least=1)
    inner_epochs: int = knob(1, "passes over an epoch's samples", at_least=1)
    learning_rate: float = knob(1e-4, "of the policy", above=0)
    critic_learning_rate: float = knob(1e-4, "of the critic", above=0)
    optimizer: Literal["adamw", "adamw-8bit"] = knob("adamw", "the policy's optimizer; 8-bit needs the extra `8bit`")
    adam_beta1: float = knob(0.9, "both optimizers", at_least=0, below=1)
    adam_beta2: float = knob(0.999, "both optimizers", at_least=0, below=1)
    adam_weight_decay: float = knob(1e-4, "both optimizers, decoupled", at_least=0)
    adam_epsilon: float = knob(1e-8, "both optimizers", above=0)
    max_grad_norm: float = knob(1.0, "gradients of policy and critic are clipped to this norm, separately", above=0)
    clip_range: float = knob(1e-4, "PPO clip of the ratio; log-probs are element means, so ratios stay near 1", above=0)
    clip_range_critic: float = knob(0.2, "clip of the value around its old one; 0 is off", at_least=0)
    kl_coef: float = knob(0.0, "weight of the KL term in the loss, against the weights that training started from; 0 is off", at_least=0)
    kl_kind: Literal["prediction", "gaussian", "flow-grpo"] = knob(
        "prediction",
        "KL term: squared difference of the predictions; of the steps' means, divided by 2 std^2; or that with Flow-GRPO's std, without sqrt(-dt)",
    )
    ema_decay: float = knob(0.0, "moving average of the trained weights, which checkpoints hold and previews show; 0 is off", at_least=0, below=1)
    ema_every: int = knob(8, "optimizer steps between updates of the moving average", at_least=1)
    timestep_fraction: float = knob(1.0, "share of the denoising steps that is trained on", above=0, at_most=1)
    shuffle_samples: bool = knob(True, "visit samples in random order")
    shuffle_timesteps: bool = knob(True, "visit each sample's steps in its own random order")
    guidance: bool = knob(True, "train with the guidance of the rollout")


@dataclass(frozen=True)
class Run:
    epochs: int = knob(100, "rollout + update cycles", at_least=1)
    seed: int = knob(42, "of every random draw", at_least=0)
    save_every: int = knob(1, "epochs between checkpoints", at_least=1)
    keep_last: int | None = knob(None, "checkpoints kept; default all", at_least=1)
    stop_on_overoptimisation: int | None = knob(
        None, "stop once the verdict was `over-optimising` this many epochs in a row, keeping the best checkpoint; default never", at_least=1
    )
    preview_images: int = knob(4, "images of fixed prompts and noise per epoch", at_least=0)
    trackers: tuple[str, ...] = knob((), "where every epoch is also sent: tensorboard, wandb (extras of the same names)")
    micro_batch: int | None = knob(None, "samples per network call on one device; default from memory; never changes the result", at_least=1)
    memory_limit: str | None = knob(
        None, "bytes a process may use, as 12GB, or auto (what is free); it chooses how the work is cut up, never the result"
    )
    cache_limit: str = knob(
        "20GB", "large text encoders: bytes of embeddings that are kept on disk, in TDPO_CACHE or the user's folder of caches; none keeps nothing"
    )
    shard: Literal["auto", "on", "off"] = knob(
        "auto", "several processes: split the frozen network's weights among them; auto where one card does not hold them; never changes the result"
    )
    compile: bool = knob(False, "compile the denoising network's repeated blocks (torch.compile): minutes at the start, faster afterwards on a GPU")
    max_bad_steps: int = knob(10, "optimizer steps with a non-finite loss or gradient before the run stops", at_least=1)


@dataclass(frozen=True)
class Shown:
    """How shown images are made: of sample, previews and cross-eval."""

    steps: int
    guidance_scale: float
    noise: float | None  # eta (DDIM) or noise level (flow); None: the family's own for shown images


@dataclass(frozen=True)
class Preset:
    model: Model = dataclasses.field(default_factory=Model)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    reward: Reward = dataclasses.field(default_factory=Reward)
    algorithm: Algorithm = dataclasses.field(default_factory=Algorithm)
    update: Update = dataclasses.field(default_factory=Update)
    run: Run = dataclasses.field(default_factory=Run)

    # --- what follows from the settings -------------------------------------------------------------------------------
    @property
    def weights(self) -> dict[str, float]:
        """The rewards that train, with their weights."""
        return self.reward.train_weights or {self.reward.train: 1.0}

    @property
    def trained(self) -> str:
        """The curve in metrics.jsonl that says how far training got: of the training reward, or of all of them combined."""
        return COMBINED if len(self.weights) > 1 else self.reward.train

    @property
    def trained_words(self) -> str:
        """What trains, in words: `pickscore`, or `pickscore + 0.5 hpsv2`."""
        return " + ".join(name if weight == 1 or len(self.weights) == 1 else f"{weight:g} {name}" for name, weight in self.weights.items())

    @property
    def drift_limit(self) -> float:
        """The largest ratio_drift that rounding explains."""
        return max(self.update.clip_range / 10, 2e-5)

    @property
    def constraints_words(self) -> str:
        """What must not fall, in words."""
        return ", ".join(f"{name} at least {bound:+g} sd" for name, bound in self.reward.at_least.items())

    @property
    def judges(self) -> tuple[str, ...]:
        """The watched rewards that a verdict reads: neither the truth nor a constraint."""
        return tuple(name for name in self.reward.watch if name not in TRUE_REWARDS and name not in self.reward.at_least)

    @property
    def rewards(self) -> tuple[str, ...]:
        """The training rewards first, then the watched ones."""
        return (*self.weights, *self.reward.watch)

    @property
    def shown(self) -> Shown:
        """How images are made where nothing trains."""
        own, rollout = self.sampling, self.rollout
        return Shown(
            steps=rollout.steps if own.steps is None else own.steps,
            guidance_scale=rollout.guidance_scale if own.guidance_scale is None else own.guidance_scale,
            noise=rollout.eta if own.noise is None else own.noise,
        )

    @property
    def has_critic(self) -> bool:
        return self.algorithm.facts.critic

    @property
    def critic_beside(self) -> int:
        """Numbers that the critic reads beside an embedding: k/T where it sees x0."""
        return int(self.algorithm.critic_state == "x0")

    @property
    def group_size(self) -> int | None:
        """Images of one prompt in an epoch, where the algorithm judges them against each other."""
        if not self.algorithm.facts.groups:
            return None
        return GROUP_SIZE if self.rollout.images_per_prompt is None else self.rollout.images_per_prompt

    @property
    def all_timesteps(self) -> bool:
        """Whether gradients are accumulated over all timesteps."""
        return self.algorithm.facts.all_timesteps and self.algorithm.update_mode == "all-timesteps"

    @property
    def guard(self) -> bool:
        return self.algorithm.facts.groups and self.algorithm.guard

    @property
    def scores_reference(self) -> bool:
        """Whether every step of the rollout is scored under the reference too."""
        shaped = not self.algorithm.facts.groups and (self.algorithm.kl_penalty_coef > 0 or self.algorithm.kl_target is not None)
        return self.algorithm.reference or shaped

    @property
    def needs_reference(self) -> bool:
        """Whether the weights that training started from must be kept."""
        return self.scores_reference or self.update.kl_coef > 0

    @property
    def stochastic_steps(self) -> int:
        """S, the denoising steps that have a log-probability: the columns of a trajectory.

        All of them with DDIM; with flow matching those of the window, or all but the last. With cps and no window that is an
        upper bound until the model is loaded: a window then leaves out the steps near the end.
        """
        rollout = self.rollout
        if rollout.window is not None:
            return rollout.window[0]
        return rollout.steps - (rollout.dynamics not in (None, "ddim"))

    @property
    def trained_steps(self) -> int:
        """Columns that an inner epoch visits."""
        return int(self.stochastic_steps * self.update.timestep_fraction)

    @property
    def updates_per_epoch(self) -> int:
        slots = 1 if self.all_timesteps else self.trained_steps
        return self.update.inner_epochs * slots * (self.rollout.samples_per_epoch // self.update.batch_size)

    @property
    def reward_queries(self) -> int:
        """Calls of the training reward over the whole run."""
        return self.rollout.samples_per_epoch * self.run.epochs

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps({name: vars(getattr(self, name)) for name in SECTIONS}))  # tuples become lists, as in TOML and JSON

    def digest(self) -> str:
        """SHA-256 of the resolved preset; manifests carry it."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


GROUP_SIZE = 8
TRUE_REWARDS = frozenset({"gold"})  # what a verdict is judged by: shown, read by no verdict, never a constraint
COMBINED = "combined"  # the curve of several training rewards together
TABLES = ("checkpoints", "train_weights", "at_least")  # of [reward]
# what may change when a run goes on
RESUMABLE = (
    "run.epochs",
    "run.save_every",
    "run.keep_last",
    "run.stop_on_overoptimisation",
    "run.trackers",
    "run.memory_limit",
    "run.cache_limit",
    "run.shard",
)
TRACKERS = ("tensorboard", "wandb")
SECTIONS: dict[str, type] = {
    "model": Model, "rollout": Rollout, "sampling": Sampling, "reward": Reward, "algorithm": Algorithm, "update": Update, "run": Run,
}  # fmt: skip


# --- what there is ---------------------------------------------------------------------------------------------------------
@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe() -> Iterator[tuple[str, str, Any, str]]:
    """(section.key, type, default, meaning) of every setting, in order."""
    for section, cls in SECTIONS.items():
        hints = hints_of(cls)
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            yield f"{section}.{field.name}", type_name(hints[field.name]), default, field.metadata["doc"]
