"""Stable Diffusion 1.x and 2.x as a policy: UNet with LoRA (or fully trained), VAE and text encoder frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tdpo_cli.errors import RequestError
from tdpo_cli.models import ddim, lora
from tdpo_cli.preset import Model
from tdpo_cli.randomness import Randomness
from tdpo_cli.types import Transition

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
        self.latent_shape = (unet.config.in_channels, *_latent_size(unet))
        self.trainable: dict[str, nn.Parameter] = {}
        self.reference_unet: UNet2DConditionModel | None = None  # only when the whole UNet trains
        self.autocast_dtype: torch.dtype | None = None  # only when fp32 weights are trained in half precision
        self._negative = self.encode([negative_prompt])  # [1,L,D]
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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token embeddings [b,L,D]; each distinct prompt goes through the encoder once."""
        distinct = list(dict.fromkeys(prompts))
        chunks = [self.text_encoder(self._tokenize(distinct[i : i + 64]).to(self.device))[0] for i in range(0, len(distinct), 64)]
        row = {prompt: i for i, prompt in enumerate(distinct)}
        return torch.cat(chunks)[[row[prompt] for prompt in prompts]]

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

    def predict(self, x_t: Tensor, k: Tensor, embeds: Tensor, guidance: float, reference: bool = False) -> Tensor:
        """The network's prediction at step k, guided (Ho & Salimans 2022) if guidance > 1. x_t [b,C,h,w], k [b] -> [b,C,h,w]"""
        unet, adapter = self._network(reference)
        t = self.timesteps[k]
        guided = guidance > 1
        if guided:
            negative = self._negative.expand(len(x_t), -1, -1)
            x_t, t, embeds = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([negative, embeds])
        autocast = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        with adapter, autocast:
            prediction = unet(x_t.to(unet.dtype), t, encoder_hidden_states=embeds.to(unet.dtype), return_dict=False)[0]
        if not guided:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def transition(self, x_t: Tensor, k: Tensor, embeds: Tensor, guidance: float, reference: bool = False) -> Transition:
        """p(x_{t-1} | x_t, c) of step k; rollout and update both come here."""
        return ddim.transition(self.predict(x_t, k, embeds, guidance, reference), x_t, k, self.schedule)

    def _network(self, reference: bool):
        if not reference:
            return self.unet, nullcontext()
        if self.reference_unet is not None:
            return self.reference_unet, nullcontext()
        return self.unet, lora.switched_off(self.unet) if self.trainable else nullcontext()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[b,C,h,w] -> images [b,3,H,W] float32 in [0,1]"""
        scaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        return (self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    # --- weights --------------------------------------------------------------------------------------------------------
    def train_lora(self, rank: int, generator: torch.Generator) -> None:
        lora.attach(self.unet, rank, generator)
        self.trainable = lora.parameters(self.unet)

    def train_everything(self, keep_reference: bool, compute_dtype: torch.dtype) -> None:
        """Full fine-tuning: fp32 weights, computing in `compute_dtype`; the reference is a frozen copy."""
        if keep_reference:
            self.reference_unet = copy.deepcopy(self.unet)
        self.unet.float().requires_grad_(True)
        self.autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self.trainable = dict(self.unet.named_parameters())

    def load_adapter(self, path: Path, trainable: bool, scale: float = 1.0) -> int:
        """Attach LoRA weights from disk. -> their rank. Raises RequestError."""
        rank = lora.load(self.unet, path)
        parameters = lora.parameters(self.unet)
        for parameter in parameters.values():
            parameter.requires_grad_(trainable)
        if trainable:
            self.trainable = parameters
        if scale != 1.0:
            lora.set_scale(self.unet, scale)
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
        if self.autocast_dtype is None and self.reference_unet is None and any("lora_" in name for name in self.trainable):
            lora.save(self.unet, folder)
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
    part = lambda cls, subfolder, **kw: _component(cls, source, subfolder, model.revision, **kw)  # noqa: E731
    text_encoder = part(CLIPTextModel, "text_encoder", torch_dtype=dtype)
    tokenizer = part(CLIPTokenizer, "tokenizer")
    vae = part(AutoencoderKL, "vae", torch_dtype=dtype)
    whole_unet = model.start_from is not None and (Path(model.start_from) / "unet").is_dir()
    unet_source = model.start_from if whole_unet else source
    unet = _component(UNet2DConditionModel, unet_source, "unet", None if whole_unet else model.revision, torch_dtype=dtype)
    scheduler_config = _scheduler_config(source, model.revision)
    _must_fit(source, unet, vae, text_encoder, tokenizer)
    for network in (text_encoder, vae, unet):
        network.requires_grad_(False).eval().to(device)
    policy = StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler_config, device, negative_prompt)
    if trainable:
        _make_trainable(policy, model, dtype, keep_reference, randomness or Randomness(0))
    elif model.start_from and not whole_unet:
        policy.load_adapter(Path(model.start_from), trainable=False, scale=lora_scale)
    return policy


def _make_trainable(policy: StableDiffusion, model: Model, dtype: torch.dtype, keep_reference: bool, randomness: Randomness) -> None:
    whole_unet = model.start_from is not None and (Path(model.start_from) / "unet").is_dir()
    if whole_unet and model.lora_rank > 0:
        raise RequestError(f"{model.start_from} holds a whole UNet, the preset asks for a LoRA of rank {model.lora_rank}. Use --set model.lora_rank=0.")
    if model.lora_rank == 0 and model.start_from and not whole_unet:
        rank = lora.rank_of(Path(model.start_from))
        raise RequestError(f"{model.start_from} holds a LoRA of rank {rank}, the preset trains the whole UNet. Use --set model.lora_rank={rank}.")
    if model.lora_rank == 0:
        policy.train_everything(keep_reference, dtype)
    elif model.start_from is None:
        policy.train_lora(model.lora_rank, randomness.initial_weights("lora"))
    else:
        rank = policy.load_adapter(Path(model.start_from), trainable=True)
        if rank != model.lora_rank:
            raise RequestError(f"{model.start_from} has LoRA rank {rank}, the preset says {model.lora_rank}. Use --set model.lora_rank={rank}.")


# the files of a network's weights, without variant and suffix: diffusers', and transformers' (safetensors, pickle)
STEMS = {CLIPTextModel: ("model", "pytorch_model")}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def _component(cls: type, source: str, subfolder: str, revision: str | None, **options: Any) -> Any:
    """`cls.from_pretrained` of one part; folders that hold only fp16 files are read too. Raises RequestError."""
    folder = Path(source) / subfolder
    local, network = Path(source).is_dir(), issubclass(cls, nn.Module)
    variants: tuple[str | None, ...] = (None, "fp16") if network else (None,)
    if local:
        variants = _variants(folder, cls) if network else _tokenizer_files(folder)
    if network:
        options |= {"output_loading_info": True}
    error: Exception | None = None
    for variant in variants:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = cls.from_pretrained(source, subfolder=subfolder, revision=revision, **options, **({"variant": variant} if variant else {}))
            break
        except Exception as caught:  # noqa: BLE001 - diffusers, transformers, safetensors, pickle and torch each raise their own
            error = error or caught
    else:
        place = folder if local else f"{source}, {subfolder}"
        advice = "Copy or download the model again." if local else f"Fetch it with: hf download {source}" + (f" --revision {revision}" if revision else "")
        raise RequestError(f"{place}: does not load as {cls.__name__}: {_reason(error)}. {advice}") from None
    if not network:
        return loaded
    network, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # the libraries would draw these at random and go on
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(f"{folder if local else source}: the {subfolder} weights lack {missing[0]}{more}. Copy or download the model again.")
    return network


def _variants(folder: Path, cls: type) -> tuple[str | None, ...]:
    """Which of a local network's weight files to read: the plain ones if there are any, else fp16's. Raises RequestError."""
    if not folder.is_dir():
        raise RequestError(f"{folder.parent}: incomplete, there is no {folder.name}/. Copy or download the whole model folder.")
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: config.json is missing. Copy or download the whole model folder.")
    stems = STEMS.get(cls, ("diffusion_pytorch_model",))
    names = [path.name for path in folder.iterdir()]
    weights = [name for name in names if name.startswith(stems) and (".safetensors" in name or ".bin" in name)]
    if not weights:
        expected = f"{stems[0]}.safetensors (or {stems[0]}.fp16.safetensors, or {stems[-1]}.bin)"
        raise RequestError(f"{folder}: no weights there, expected {expected}. Copy or download the whole model folder.")
    plain = [name for name in weights if ".fp16" not in name]
    for name in sorted(plain or weights):
        if name.endswith(".safetensors"):
            lora.check(folder / name)
    return (None,) if plain else ("fp16",)


def _tokenizer_files(folder: Path) -> tuple[None]:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise RequestError(
            f"{folder}: no tokenizer there, expected vocab.json and merges.txt (or tokenizer.json). Copy or download the whole model folder."
        )
    return (None,)


def _must_fit(source: str, unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """The parts belong together, and the UNet is one that takes latents and a prompt only. Raises RequestError."""
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise RequestError(
            f"{source}: its UNet takes {channels} channels and its VAE makes {latent}: a model for inpainting, upscaling or editing. "
            "Only text-to-image models can be trained."
        )
    seen, given = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if seen != given:
        raise RequestError(f"{source}: its UNet reads prompts {seen} wide and its text encoder makes them {given} wide: parts of different models.")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise RequestError(
            f"{source}: its tokenizer knows {len(tokenizer)} tokens and its text encoder {text_encoder.config.vocab_size}: parts of different models."
        )


def _latent_size(unet: nn.Module) -> tuple[int, int]:
    size = unet.config.sample_size
    if size is None:
        raise RequestError("the UNet's config.json does not say sample_size, the side of a latent (64 for 512 pixels).")
    height, width = (size, size) if isinstance(size, int) else size
    # the first Stable Diffusion uploads said 32 and meant 64; diffusers' own pipeline mends them alike
    if size == 32 and _version(unet.config.get("_diffusers_version", "9")) < (0, 9):
        height = width = 64
    return height, width


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _reason(error: Exception | None) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return first if len(first) <= 200 else first[:200] + " ..."


def _scheduler_config(source: str, revision: str | None) -> dict[str, Any]:
    folder = Path(source) / "scheduler"
    if Path(source).is_dir() and not (folder / "scheduler_config.json").is_file():
        raise RequestError(f"{folder}: scheduler_config.json is missing. Copy or download the whole model folder.")
    try:
        return dict(DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder if Path(source).is_dir() else source}: cannot read its scheduler: {_reason(error)}.") from None
