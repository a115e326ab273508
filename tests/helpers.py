"""What several test files need: small presets, a policy of four weights, a hand-made trajectory, the command line in-process."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli import cli
from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.types import Conditioning, Trajectory, Transition

thorough = True  # set by tests/conftest.py: whether slow tests run too


def make_preset(**settings: Any) -> Preset:
    """The default preset with `section__key=value` on top, checked."""
    return presets.override(Preset(), [(key.replace("__", "."), value) for key, value in settings.items()])


class LinearPolicy:
    """mean = weight[k] * x_t + bias * mean(text) * guidance, std = 0.5: as much of a Policy as the update needs."""

    def __init__(self, steps: int = 3, latent_shape: tuple[int, int, int] = (1, 2, 2)):
        self.device = torch.device("cpu")
        self.latent_shape = latent_shape
        self.timesteps = torch.arange(steps).flip(0)
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 0.9, steps))
        self.bias = torch.nn.Parameter(torch.tensor(0.1))
        self.trainable = {"weight": self.weight, "bias": self.bias}
        self.calls: list[int] = []  # rows of every call
        self.reference = self.weight.detach().clone(), self.bias.detach().clone()

    def transition(self, x_t: Tensor, k: Tensor, texts: Conditioning, rows: Tensor, guidance: float, reference: bool = False) -> Transition:
        self.calls.append(len(x_t))
        weight, bias = self.reference if reference else (self.weight, self.bias)
        column = (-1, 1, 1, 1)
        mean = weight[k].view(column) * x_t + bias * guidance * texts[rows].parts["embeds"].mean(dim=(1, 2)).view(column)
        return Transition(mean, torch.full((len(x_t), 1, 1, 1), 0.5), x0=mean, prediction=2 * mean)


@torch.no_grad()
def make_trajectory(policy: LinearPolicy, samples: int, embed_dim: int = 5, guidance: float = 1.0, epoch: int = 0, seed: int = 0) -> Trajectory:
    """Samples of the policy with seeded noise, seeded image embeddings and values."""
    draw = torch.Generator().manual_seed(seed)
    steps = len(policy.timesteps)
    texts, rows = Conditioning({"embeds": torch.randn(samples, 2, 3, generator=draw)}), torch.arange(samples)
    states, log_probs = [torch.randn(samples, *policy.latent_shape, generator=draw)], []
    for k in range(steps):
        transition = policy.transition(states[-1], torch.full((samples,), k), texts, rows, guidance)
        states.append(transition.sample(torch.randn(samples, *policy.latent_shape, generator=draw)))
        log_probs.append(transition.log_prob(states[-1]))
    return Trajectory(
        epoch=epoch,
        prompts=tuple("ab"[i % 2] for i in range(samples)),
        prompt_keys=tuple("ab"[i % 2] for i in range(samples)),
        sample_ids=torch.arange(samples),
        texts=texts,
        text_rows=rows,
        steps=torch.arange(steps),
        latents=torch.stack(states, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        ref_log_probs=None,
        image_embeds=torch.nn.functional.normalize(torch.randn(samples, steps, embed_dim, generator=draw), dim=-1),
        values=torch.randn(samples, steps, generator=draw) / 10,
        images=torch.rand(samples, 3, 4, 4, generator=draw),
    )


def tiny_vae(folder: Path, seed: int = 0, channels: int = 4, factor: int = 4) -> str:
    """A small AutoencoderTiny with random weights, for the sandbox's latents unless said otherwise. -> the folder"""
    from diffusers import AutoencoderTiny

    levels = factor.bit_length()  # each but the last doubles the size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels, num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels, latent_channels=channels,
        )  # fmt: skip
    vae.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


def tdpo(*arguments: object, stdin: str = "") -> Outcome:
    """Run the command line inside this process: the exit status, standard output and standard error that a shell would see."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, signal.getsignal(signal.SIGTERM)
    sys.argv, sys.stdin = ["tdpo", *map(str, arguments)], io.StringIO(stdin)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        return Outcome(exit_.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv, sys.stdin = before[:2]
        signal.signal(signal.SIGTERM, before[2])
    raise AssertionError("main() returns no status: it always exits")
