"""Stable Diffusion 1.x and 2.x as a policy: UNet with LoRA (or fully trained), VAE and text encoder frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tdpo_cli.config.preset import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.models import adapter
from tdpo_cli.models.loading import component, latent_size, must_fit, read_scheduler_config
from tdpo_cli.models.samplers import ddim
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Conditioning, Transition

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class StableDiffusion:
    """A Policy (see tdpo_cli.models). Networks may be half precision; latents, the DDIM step and log-probs are fp32."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
        device: torch.device,
        negative_prompt: str = "",
    ):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler_config = scheduler_config
        self.device = device
        self.latent_shape = (unet.config.in_channels, *latent_size(unet))
        self.trainable: dict[str, nn.Parameter] = {}
        self.reference_unet: UNet2DConditionModel | None = None  # only when the whole UNet trains
        self.autocast_dtype: torch.dtype | None = None  # only when fp32 weights are trained in half precision
        self._negative = self._embeds([negative_prompt])  # [1,L,D]
        self._warned_about_length = False

    # --- text -----------------------------------------------------------------------------------------------------------
    def _tokenize(self, prompts: Sequence[str]) -> Tensor:
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return ids

    def longer_than_limit(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose ends the tokenizer cuts off."""
        limit = self.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]

    def normal_form(self, prompt: str) -> str:
        """The prompt as the text encoder saw it: lower case, truncated. Prompts are told apart by it."""
        return self.tokenizer.decode(self._tokenize([prompt])[0], skip_special_tokens=True)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A row per prompt, and the negative prompt's last."""
        return Conditioning({"embeds": torch.cat([*([self._embeds(prompts)] if prompts else []), self._negative])})

    @torch.no_grad()
    def _embeds(self, prompts: Sequence[str]) -> Tensor:
        chunks = [self.text_encoder(self._tokenize(prompts[i : i + 64]).to(self.device))[0] for i in range(0, len(prompts), 64)]
        return torch.cat(chunks)

    # --- denoising ------------------------------------------------------------------------------------------------------
    def set_schedule(self, steps: int, eta: float) -> None:
        """The T steps from noise to image. Raises RequestError if a policy that trains could not score them."""
        self.schedule = ddim.schedule(self.scheduler_config, steps, eta).to(self.device)
        self.timesteps = self.schedule.timesteps
        silent = (~(self.schedule.sigma > 0)).nonzero().flatten().tolist()
        if silent and self.trainable:
            raise RequestError(
                f"denoising step {silent[0]} of {steps} (timestep {int(self.timesteps[silent[0]])}) adds no noise, so it has no log-probability "
                f"to train on. A policy gradient needs noise in every step: rollout.eta is {eta}; the scheduler's timestep_spacing is "
                f"{self.scheduler_config.get('timestep_spacing', 'leading')!r} (`leading` works)."
            )

    def predict(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Tensor:
        """The network's prediction at step k, guided (Ho & Salimans 2022) if guidance > 1. x_t [b,C,h,w], k [b] -> [b,C,h,w]"""
        unet, adapter = self._network(reference)
        t = self.timesteps[k]
        guided = guidance > 1
        if guided:
            x_t, t, rows = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([torch.full_like(rows, len(texts) - 1), rows])
        embeds = texts[rows].parts["embeds"]
        autocast = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        with adapter, autocast:
            prediction = unet(x_t.to(unet.dtype), t, encoder_hidden_states=embeds.to(unet.dtype), return_dict=False)[0]
        if not guided:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def transition(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Transition:
        """p(x_{t-1} | x_t, c) of step k; rollout and update both call it."""
        return ddim.transition(self.predict(x_t, k, texts, rows, guidance, reference), x_t, k, self.schedule)

    def _network(self, reference: bool):
        if not reference:
            return self.unet, nullcontext()
        if self.reference_unet is not None:
            return self.reference_unet, nullcontext()
        return self.unet, adapter.switched_off(self.unet) if self.trainable else nullcontext()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[b,C,h,w] -> images [b,3,H,W] float32 in [0,1]"""
        scaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        return (self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    # --- memory and speed ---------------------------------------------------------------------------------------------
    def cut_up(self, checkpointing: bool, compile: bool) -> None:
        """Recompute activations in the backward pass; compile the UNet's repeated blocks. Raises RequestError without a compiler."""
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        if compile:
            if not hasattr(self.unet, "compile_repeated_blocks"):
                raise RequestError("run.compile needs a newer diffusers: pip install -U diffusers, or --set run.compile=false.")
            self.unet.compile_repeated_blocks()

    # --- weights --------------------------------------------------------------------------------------------------------
    def train_lora(self, rank: int, generator: torch.Generator) -> None:
        adapter.attach(self.unet, rank, generator)
        self.trainable = adapter.parameters(self.unet)

    def train_everything(self, keep_reference: bool, compute_dtype: torch.dtype) -> None:
        """Full fine-tuning: fp32 weights, computing in `compute_dtype`; the reference is a frozen copy."""
        if keep_reference:
            self.reference_unet = copy.deepcopy(self.unet)
        self.unet.float().requires_grad_(True)
        self.autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self.trainable = dict(self.unet.named_parameters())

    def load_adapter(self, path: Path, trainable: bool, scale: float = 1.0) -> int:
        """Attach LoRA weights from disk. -> their rank. Raises RequestError."""
        rank = adapter.load(self.unet, path)
        parameters = adapter.parameters(self.unet)
        for parameter in parameters.values():
            parameter.requires_grad_(trainable)
        if trainable:
            self.trainable = parameters
        if scale != 1.0:
            adapter.set_scale(self.unet, scale)
        return rank

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trainable.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        ours = {name: tuple(p.shape) for name, p in self.trainable.items()}
        theirs = {name: tuple(p.shape) for name, p in state.items()}
        if ours != theirs:
            odd = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))
            raise RequestError(f"saved policy weights do not fit this model: {odd[0]} {list(odd[1])}. Was model.lora_rank or model.base changed?")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """LoRA in diffusers' layout, or the whole UNet as `unet/`."""
        if any("lora_" in name for name in self.trainable):
            adapter.save(self.unet, folder)
        else:
            self.unet.save_pretrained(folder / "unet")


# --- loading ------------------------------------------------------------------------------------------------------------
def load(
    source: str,
    model: Model,
    *,
    device: torch.device,
    trainable: bool = True,
    negative_prompt: str = "",
    keep_reference: bool = False,
    randomness: Randomness | None = None,
    lora_scale: float = 1.0,
) -> StableDiffusion:
    """Networks of a StableDiffusionPipeline folder or hub id, one by one (no pipeline object, no safety checker)."""
    dtype = DTYPES[model.dtype] if device.type != "cpu" else torch.float32
    part = lambda cls, subfolder, **kw: component(cls, source, subfolder, model.revision, **kw)
    text_encoder = part(CLIPTextModel, "text_encoder", torch_dtype=dtype)
    tokenizer = part(CLIPTokenizer, "tokenizer")
    vae = part(AutoencoderKL, "vae", torch_dtype=dtype)
    whole_unet = model.start_from is not None and (Path(model.start_from) / "unet").is_dir()
    unet_source = model.start_from if whole_unet else source
    unet = component(UNet2DConditionModel, unet_source, "unet", None if whole_unet else model.revision, torch_dtype=dtype)
    scheduler_config = read_scheduler_config(source, model.revision)
    must_fit(source, unet, vae, text_encoder, tokenizer)
    for network in (text_encoder, vae, unet):
        network.requires_grad_(False).eval().to(device)
    if device.type == "cuda":
        # what convolutions on tensor cores want; on a CPU it gains nothing (benchmarks/ladder.py)
        vae.to(memory_format=torch.channels_last)
        unet.to(memory_format=torch.channels_last)
    policy = StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler_config, device, negative_prompt)
    if trainable:
        _make_trainable(policy, model, dtype, keep_reference, randomness or Randomness(0))
    elif model.start_from and not whole_unet:
        policy.load_adapter(Path(model.start_from), trainable=False, scale=lora_scale)
    return policy


def _make_trainable(policy: StableDiffusion, model: Model, dtype: torch.dtype, keep_reference: bool, randomness: Randomness) -> None:
    whole_unet = model.start_from is not None and (Path(model.start_from) / "unet").is_dir()
    if whole_unet and model.lora_rank > 0:
        raise RequestError(
            f"{model.start_from} holds a whole UNet, the preset asks for a LoRA of rank {model.lora_rank}. Use --set model.lora_rank=0."
        )
    if model.lora_rank == 0 and model.start_from and not whole_unet:
        rank = adapter.rank_of(Path(model.start_from))
        raise RequestError(f"{model.start_from} holds a LoRA of rank {rank}, the preset trains the whole UNet. Use --set model.lora_rank={rank}.")
    if model.lora_rank == 0:
        policy.train_everything(keep_reference, dtype)
    elif model.start_from is None:
        policy.train_lora(model.lora_rank, randomness.initial_weights("lora"))
    else:
        rank = policy.load_adapter(Path(model.start_from), trainable=True)
        if rank != model.lora_rank:
            raise RequestError(f"{model.start_from} has LoRA rank {rank}, the preset says {model.lora_rank}. Use --set model.lora_rank={rank}.")
