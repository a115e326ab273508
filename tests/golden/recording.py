"""Read a golden trace and hand its noise, shuffles and weights to the product through the product's own seams."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.models.families.sd import StableDiffusion
from tdpo_cli.types import Conditioning, Trajectory

KEPT = Path(__file__).parent.parent / "data" / "trace_a"  # the trace in the project, without its full states


class Trace:
    """One recorded run of the official training script."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "trace.json").read_text())
        self.config = self.meta["config"]
        self.epochs = self.meta["epochs"]
        self.tensors: dict[str, Tensor] = {}
        for file in ("init", "trace", "full_states"):
            if (self.folder / f"{file}.safetensors").exists():
                self.tensors |= load_file(self.folder / f"{file}.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def preset(self) -> Preset:
        """The official configuration in our words."""
        sample, train = self.config["sample"], self.config["train"]
        per_prompt = self.config["per_prompt_running_moments"]
        normalise = "none"
        if sample["reward_norm"] or sample["reward_scaling"]:
            normalise = "per-prompt" if per_prompt else "global"
        advantage_norm = "global" if sample["temporal_reward_norm"] else "none"
        if sample.get("temporal_reward_norm_per_prompt"):
            advantage_norm = "per-prompt"
        return presets.from_dict(
            {
                "model": {"base": str(self.folder / "model/pipeline"), "lora_rank": self.meta["lora_rank"], "dtype": "fp32"},
                "rollout": {
                    "samples_per_epoch": sample["batch_size"] * sample["num_batches_per_epoch"],
                    "steps": sample["num_steps"],
                    "guidance_scale": sample["guidance_scale"],
                    "eta": sample["eta"],
                },
                "reward": {
                    "normalise": normalise,
                    "scale_only": bool(sample["reward_scaling"]),
                    "clip_range": float(sample["clip_range_reward"]),
                    **({"buffer_size": per_prompt["buffer_size"], "min_count": per_prompt["min_count"]} if per_prompt else {}),
                },
                "algorithm": {
                    "name": "tdpo-r" if sample["neuron_reset_critic"] else "tdpo",
                    "gamma": sample["gamma"],
                    "advantage_norm": advantage_norm,
                    "critic_coef": train["cf_coef"],
                    "critic_dropout": any(p > 0 for p in self.meta["dropout_p"]),
                    "critic_init_std": self.meta["effective"]["critic_init_std"],
                    "reset_every": sample["neuron_reset_freq"],
                    "dormant_threshold": sample["dormant_threshold"],
                    "extra_dormant_threshold": sample["extra_dormant_threshold"],
                    "neuron_rows": sample["batch_size"],
                    "reference": bool(sample["reference"]),
                    "kl_penalty": sample["kl_penalty"],
                    "kl_penalty_coef": sample["kl_penalty_coef"],
                    "init_kl_coef": sample["init_kl_coef"],
                    "kl_target": sample["target"],
                    "kl_horizon": sample["horizon"],
                },
                "update": {
                    "batch_size": train["batch_size"] * train["gradient_accumulation_steps"],
                    "inner_epochs": train["num_inner_epochs"],
                    "learning_rate": train["learning_rate"],
                    "critic_learning_rate": train["learning_rate_critic"],
                    "adam_beta1": train["adam_beta1"],
                    "adam_beta2": train["adam_beta2"],
                    "adam_weight_decay": train["adam_weight_decay"],
                    "adam_epsilon": train["adam_epsilon"],
                    "max_grad_norm": train["max_grad_norm"],
                    "clip_range": train["clip_range"],
                    "clip_range_critic": train["clip_range_critic"],
                    "timestep_fraction": train["timestep_fraction"],
                    "shuffle_samples": train["shuffle_batch"],
                    "shuffle_timesteps": train["shuffle_timestep"],
                    "guidance": train["cfg"],
                },
                "run": {"epochs": len(self.epochs), "seed": self.config["seed"]},
            },
            where=str(self.folder),
        )

    @property
    def ref_log_probs_name(self) -> str:
        """What the reference log-probs are called, without the epoch."""
        names = [name.split("/", 1)[1] for name in self.tensors if "ref" in name and "log_prob" in name]
        return names[0] if names else "ref_log_probs"

    def recorded_trajectory(self, epoch: int, policy: StableDiffusion) -> Trajectory:
        """The trajectory as recorded, so that an error of the networks does not hide behind one of the formulas."""
        e = f"e{epoch}/"
        return Trajectory(
            epoch=epoch,
            prompts=tuple(self.epochs[epoch]["prompts"]),
            prompt_keys=tuple(self.epochs[epoch]["prompts_decoded"]),
            sample_ids=torch.arange(len(self.epochs[epoch]["prompts"])),
            texts=Conditioning({"embeds": torch.cat([self[e + "prompt_embeds"], policy.encode([]).parts["embeds"]])}),
            text_rows=torch.arange(len(self.epochs[epoch]["prompts"])),
            steps=torch.arange(len(policy.timesteps)),
            latents=self[e + "latents"],
            log_probs=self[e + "log_probs"].clone(),
            ref_log_probs=self.tensors.get(e + self.ref_log_probs_name),
            image_embeds=self[e + "image_embeds"],
            values=self[e + "residuals"],
            images=self[e + "final_images"],
        )

    # --- weights --------------------------------------------------------------------------------------------------------
    def load_initial_weights(self, policy: StableDiffusion, critic: Critic) -> None:
        with torch.no_grad():
            for entry in self.meta["lora_layout"]:
                policy.trainable[our_lora_name(entry["name"])].copy_(self["init/lora/" + entry["name"]])
            for entry, parameter in zip(self.meta["critic_layout"], critic_parameters(critic), strict=True):
                parameter.copy_(self["init/critic/" + entry["name"]])

    def load_lora(self, policy: StableDiffusion, vector: Tensor) -> None:
        with torch.no_grad():
            for entry in self.meta["lora_layout"]:
                parameter = policy.trainable[our_lora_name(entry["name"])]
                parameter.copy_(vector[entry["offset"] : entry["offset"] + parameter.numel()].view_as(parameter))

    def flat_lora(self, tensors: dict[str, Tensor]) -> Tensor:
        """One vector in the order of the trace's lora_layout."""
        return torch.cat([tensors[our_lora_name(entry["name"])].detach().reshape(-1) for entry in self.meta["lora_layout"]])


def our_lora_name(official: str) -> str:
    """`X.processor.to_out_lora.up.weight` -> `X.to_out.0.lora_B.policy.weight`"""
    module, _, rest = official.partition(".processor.")
    projection, direction, _ = rest.split(".")
    target = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}[projection]
    return f"{module}.{target}.{'lora_A' if direction == 'down' else 'lora_B'}.policy.weight"


def critic_parameters(critic: Critic) -> list[torch.nn.Parameter]:
    """In the order of the trace's critic_layout: weight and bias, layer by layer."""
    return [parameter for layer in critic.layers for parameter in (layer.weight, layer.bias)]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class TraceRandomness:
    """The recorded draws, through the methods of tdpo_cli.randomness.Randomness."""

    def __init__(self, trace: Trace):
        self.trace = trace
        train = trace.config["train"]
        self.batch, self.accumulation = train["batch_size"], train["gradient_accumulation_steps"]

    def prompts(self, epoch, sample_ids, choices):
        return tuple(self.trace.epochs[epoch]["prompts"][i] for i in sample_ids)

    def initial_latents(self, epoch, sample_ids, shape):
        return self.trace[f"e{epoch}/latents"][list(sample_ids), 0]

    def step_noise(self, epoch, step, sample_ids, shape):
        return self.trace[f"e{epoch}/noise"][list(sample_ids), step]

    def permutation(self, epoch, inner, n):
        return self.trace[f"e{epoch}/i{inner}/perm"]

    def step_permutations(self, epoch, inner, n, steps):
        return self.trace[f"e{epoch}/i{inner}/perms"]

    def keep_masks(self, epoch, inner, step, rows, widths, drop, repeat=0):
        if repeat:
            raise ValueError("a trace has the masks of one critic step per batch: the official code takes no more")
        micro = slice(step * self.accumulation, (step + 1) * self.accumulation)
        masks = [self.trace[f"e{epoch}/i{inner}/mb/dropout_mask{layer}"][micro] for layer in range(len(widths))]
        return [mask.reshape(rows, -1).bool() for mask in masks]

    def reset(self, epoch, inner):
        # the official reset draws from the global generator, seeded anew with the run's seed every time
        return torch.Generator().manual_seed(self.trace.config["seed"])
