"""A text-to-image model as a policy: each denoising step is an action with a Gaussian density."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tdpo_cli.errors import RequestError
from tdpo_cli.models.adapter import Adapter
from tdpo_cli.models.embeddings import Embeddings
from tdpo_cli.models.family import Family
from tdpo_cli.models.samplers import Sampler
from tdpo_cli.types import Conditioning, Transition

ENCODE_CHUNK = 64  # prompts per call of the text encoders: fixed, so that the number of processes does not change the rounding


class Policy:
    """Family, sampler and adapter together: all that rollout, update, sampling and cross-evaluation use.

    Networks may be half precision; latents, the step and log-probs are fp32. Rollout and update call the same `transition`.
    `reference` means the weights before any training.
    """

    def __init__(self, family: Family, adapter: Adapter, negative_prompt: str = "", embeddings: Embeddings | None = None):
        self.family, self.adapter, self.embeddings = family, adapter, embeddings
        self.device, self.latent_shape = family.device, family.latent_shape
        self.sampler: Sampler  # set by `set_schedule`
        # the network's weights are split among processes: all of them make each of its calls together
        self.sharded = any(hasattr(parameter, "to_local") for parameter in family.network.parameters())
        if embeddings is not None:
            self._negative = embeddings.encode(family, [negative_prompt], negative=True)[0].to(family.device)
            return
        with torch.no_grad(), family.encoding():
            self._negative = family.encode_negative(negative_prompt)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return self.adapter.trainable

    # --- schedule -------------------------------------------------------------------------------------------------------
    def set_schedule(
        self, steps: int, noise: float | Sequence[float] | None = None, dynamics: str | None = None, window: tuple[int, int] | None = None
    ) -> None:
        """Set the T steps from noise to image; arguments as for `Family.sampler`. Raises RequestError for steps that cannot be trained."""
        sampler = self.family.sampler(steps, noise, dynamics, window)
        if self.trainable:
            sampler.check_trainable()
        self.sampler = sampler

    def scheduled(self, steps: int, noise: float | Sequence[float] | None = None, dynamics: str | None = None) -> Policy:
        """The same networks under another schedule, for shown images: its steps need not be trainable."""
        other = copy.copy(self)
        other.sampler = self.family.sampler(steps, self.family.shown_noise if noise is None else noise, dynamics)
        return other

    @property
    def timesteps(self) -> Tensor:
        """[T], what the network is given."""
        return self.sampler.timesteps

    @property
    def stochastic(self) -> Tensor:
        """[T] bool, the steps that have a log-probability."""
        return self.sampler.stochastic

    # --- text -----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A row per prompt, and the negative prompt's last."""
        if self.embeddings is not None:
            rows = [row.to(self.device) for row in self.embeddings.encode(self.family, prompts)]
            return Conditioning.cat([*rows, self._negative])
        with self.family.encoding() if prompts else contextlib.nullcontext():
            chunks = [self.family.encode(list(prompts[i : i + ENCODE_CHUNK])) for i in range(0, len(prompts), ENCODE_CHUNK)]
        return Conditioning.cat([*chunks, self._negative])

    def longer_than_limit(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose ends are truncated."""
        return self.family.longer_than_limit(prompts)

    def normal_form(self, prompt: str) -> str:
        """The prompt as the text encoder reads it; statistics per prompt are kept under it."""
        return self.family.normal_form(prompt)

    # --- denoising ------------------------------------------------------------------------------------------------------
    def predict(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Tensor:
        """The network's prediction at step k, with guidance. x_t [b,...], k [b], rows [b] of `texts` -> as x_t

        `texts` is of `encode`: its last row is the negative prompt. Classifier-free guidance above 1 doubles the batch, in the
        order [unconditional, conditional].
        """
        family, t = self.family, self.sampler.timesteps[k]
        with self.adapter.computing(family, reference), self._gathering():
            if family.guidance != "cfg" or guidance <= 1:
                return family.denoise(x_t, t, texts[rows], guidance)
            both = texts[torch.cat([torch.full_like(rows, len(texts) - 1), rows])]
            prediction = family.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both, guidance)
        return family.combine(*prediction.chunk(2), guidance)

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[None]:
        """A sharded network keeps the buffers it gathers into: made in inference mode, they could not be used for training."""
        if not (self.sharded and torch.is_inference_mode_enabled()):
            yield
            return
        with torch.inference_mode(False), torch.no_grad():
            yield

    def transition(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Transition:
        """p(x' | x_t, c) of step k. Arguments as for `predict`."""
        prediction = self.predict(x_t, k, texts, rows, guidance, reference)
        return replace(self.sampler.step(prediction, x_t, k), prediction=prediction)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[b,*latent_shape] -> images [b,3,H,W] float32 in [0,1]"""
        return self.family.decode(latents)

    # --- memory and speed ---------------------------------------------------------------------------------------------
    def cut_up(self, checkpointing: bool, compile: bool) -> None:
        """Recompute activations in the backward pass; compile the repeated blocks. Raises RequestError without a compiler."""
        network = self.family.network
        if checkpointing:
            network.enable_gradient_checkpointing()
        if compile:
            if not hasattr(network, "compile_repeated_blocks"):
                raise RequestError("run.compile needs a newer diffusers: pip install -U diffusers, or --set run.compile=false.")
            if getattr(network, "_repeated_blocks", None):
                network.compile_repeated_blocks()
            else:  # as of Stable Diffusion 3's transformer: diffusers does not name its blocks
                for block in (block for child in network.children() if isinstance(child, nn.ModuleList) for block in child):
                    block.compile()

    # --- weights --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trainable.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises RequestError for weights of another shape."""
        self.adapter.recognise(self.family, state)
        ours = {name: tuple(p.shape) for name, p in self.trainable.items()}
        theirs = {name: tuple(p.shape) for name, p in state.items()}
        if ours != theirs:
            odd = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))
            raise RequestError(f"saved policy weights do not fit this model: {odd[0]} {list(odd[1])}. Was model.lora_rank or model.base changed?")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write the weights in diffusers' layout: a LoRA file, or the whole network as `unet/` or `transformer/`."""
        self.adapter.save(self.family, folder)
