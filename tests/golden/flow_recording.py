"""Read a golden trace of Flow-GRPO and set up the product's policy as that run had it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tdpo_cli import models
from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.models import adapter
from tdpo_cli.models.policy import Policy

KEPT_FLOW = Path(__file__).parent.parent / "data" / "trace_flow"  # the trace in the project
DYNAMICS = {"sde": "flow-sde", "cps": "cps"}  # the reference's words, and ours


def is_flow(folder: Path) -> bool:
    """Whether a trace is of Flow-GRPO, by its trace.json."""
    return str(json.loads((folder / "trace.json").read_text()).get("format", "")).startswith("flow-grpo")


class FlowTrace:
    """One recorded run of the public Flow-GRPO code."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.meta: dict[str, Any] = json.loads((self.folder / "trace.json").read_text())
        self.config, self.layout = self.meta["config"], self.meta["lora_layout"]
        self.tensors: dict[str, Tensor] = load_file(self.folder / "trace.safetensors")
        self.steps: int = self.config["sample"]["num_steps"]
        self.guidance: float = self.config["sample"]["guidance_scale"]
        self.noise: float = self.config["sample"]["noise_level"]
        self.dynamics = DYNAMICS[self.config["sample"].get("sde_type", "sde")]
        self.trained: int = self.config["num_train_timesteps"]
        self.clip_range: float = self.config["train"]["clip_range"]
        self.beta: float = self.config["train"]["beta"]
        self.grouped: bool = self.config["sample"]["num_image_per_prompt"] > 1

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def inner_epochs(self) -> list[tuple[int, int]]:
        """Every (epoch, inner epoch) in order."""
        train = self.config["train"]
        return [(epoch, inner) for epoch in range(self.config["epochs"]) for inner in range(train["num_inner_epochs"])]

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.meta["E"]["updates"])

    def preset(self) -> Preset:
        """The settings of advantages and optimizer in our words."""
        train = self.config["train"]
        return presets.from_dict(
            {
                "model": {"base": str(self.folder / "model"), "lora_rank": self.config["lora"]["r"], "dtype": "fp32"},
                "algorithm": {
                    "name": "grpo",
                    "advantage_std": "epoch" if self.config["sample"]["global_std"] and self.grouped else "group",
                    "advantage_clip": train["adv_clip_max"],
                },
                "update": {
                    "learning_rate": train["learning_rate"],
                    "adam_beta1": train["adam_beta1"],
                    "adam_beta2": train["adam_beta2"],
                    "adam_weight_decay": train["adam_weight_decay"],
                    "adam_epsilon": train["adam_epsilon"],
                    "max_grad_norm": train["max_grad_norm"],
                    "clip_range": self.clip_range,
                },
            },
            where=str(self.folder),
        )

    def policy(self) -> Policy:
        """The pipeline with a LoRA on the recorded targets, carrying the recorded initial weights."""
        side, lora = self.config["resolution"], self.config["lora"]
        loaded = models.load(Model(base=str(self.folder / "model"), dtype="fp32", resolution=(side, side)), trainable=False)
        loaded.family.t5_length = self.config["max_sequence_length"]
        part = adapter.attach(loaded.family.network, lora["r"], lora["target_modules"], torch.Generator())
        # a new adapter has alpha = rank
        adapter.set_scale(loaded.family, lora["alpha"] / lora["r"])
        policy = Policy(loaded.family, part)
        self.load_lora(policy, self["init/lora"])
        return policy

    # --- LoRA vectors ---------------------------------------------------------------------------------------------------
    def load_lora(self, policy: Policy, vector: Tensor) -> None:
        with torch.no_grad():
            for name, part in self._parts(vector):
                policy.trainable[name].copy_(part)

    def load_gradient(self, policy: Policy, vector: Tensor) -> None:
        for name, part in self._parts(vector):
            policy.trainable[name].grad = part.clone()

    def flat(self, tensors: dict[str, Tensor]) -> Tensor:
        """One vector in the order of the trace's lora_layout."""
        if set(tensors) != {our_lora_name(entry["name"]) for entry in self.layout}:
            raise AssertionError("the trace's LoRA is on other layers than ours")
        return torch.cat([tensors[our_lora_name(entry["name"])].detach().reshape(-1) for entry in self.layout])

    def _parts(self, vector: Tensor) -> list[tuple[str, Tensor]]:
        sizes = [torch.Size(entry["shape"]) for entry in self.layout]
        parts = [vector[entry["offset"] : entry["offset"] + size.numel()] for entry, size in zip(self.layout, sizes, strict=True)]
        return [(our_lora_name(entry["name"]), part.view(size)) for entry, part, size in zip(self.layout, parts, sizes, strict=True)]


def our_lora_name(official: str) -> str:
    """`base_model.model.X.lora_A.default.weight` -> `X.lora_A.policy.weight`"""
    return official.removeprefix("base_model.model.").replace(".default.", f".{adapter.ADAPTER}.")
