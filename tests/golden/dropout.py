"""A made-up trace with dropout: the kept trace's first epoch, its critic recorded anew with keep masks.

The kept trace has no dropout. In its first epoch nothing but the critic's update depends on it, so everything else stays
as the official code recorded it. The critic is trained here in plain formulas that share no code with the product:
activations x mask / (1 - p), the clipped loss, gradients by autograd, one AdamW step a batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from recording import KEPT, Trace
from safetensors.torch import save_file
from torch import Tensor

DROP = (0.2, 0.2, 0.1)  # as published, behind the first three layers
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
INNER = "e0/i0/"
# what the critic's update decides, by the start of its name
OF_THE_CRITIC = (
    "mb/residual", "mb/cf_loss", "mb/cf_clipfrac", "mb/loss", "opt/critic", "opt/grad_norm_critic", "neuron/activation", "neuron/score",
    "neuron/dormant_mask",
)  # fmt: skip


def write(folder: Path) -> Path:
    """Write the trace into the empty FOLDER. -> FOLDER"""
    kept = Trace(KEPT)
    recorded = _with_masks(kept)
    tensors = {name: tensor for name, tensor in kept.tensors.items() if name.startswith("e0/")}
    missing = {name for name in tensors if name.removeprefix(INNER).startswith(OF_THE_CRITIC)} - recorded.keys()
    assert not missing, f"recorded with another critic and not anew: {sorted(missing)}"
    tensors |= {name: tensor.contiguous() for name, tensor in recorded.items()}
    meta = {**kept.meta, "epochs": [_counted(kept.epochs[0], recorded)], "dropout_p": list(DROP)}
    (folder / "model").symlink_to(KEPT / "model")
    (folder / "init.safetensors").symlink_to(KEPT / "init.safetensors")
    save_file(tensors, folder / "trace.safetensors")
    (folder / "trace.json").write_text(json.dumps(meta))
    return folder


def _with_masks(kept: Trace) -> dict[str, Tensor]:
    """Train the critic through the recorded order with masks and note what the official recorder notes."""
    train = kept.config["train"]
    samples, ks = kept[INNER + "mb/sample_index"], kept[INNER + "mb/step_index"]  # [micro-batches, rows]
    generator = torch.Generator().manual_seed(20)
    parameters = [kept[f"init/critic/{layer}.{part}"].clone().requires_grad_() for layer in LAYERS for part in ("weight", "bias")]
    widths = [len(bias) for bias in parameters[1::2]][: len(DROP)]
    masks = [torch.rand(*samples.shape, width, generator=generator) >= p for width, p in zip(widths, DROP, strict=True)]
    optimizer = torch.optim.AdamW(
        parameters, lr=train["learning_rate_critic"], betas=(train["adam_beta1"], train["adam_beta2"]),
        eps=train["adam_epsilon"], weight_decay=train["adam_weight_decay"],
    )  # fmt: skip
    probe, notes = kept["init/critic_probe_index"], {}
    accumulation, clip_range = train["gradient_accumulation_steps"], train["clip_range_critic"]
    for start in range(0, len(samples), accumulation):
        optimizer.zero_grad()
        for row in range(start, start + accumulation):
            pair = samples[row], ks[row]
            value = _outputs(parameters, kept["e0/image_embeds"][pair], [mask[row] for mask in masks])[-1][:, 0]
            old, target = kept["e0/residuals"][pair], kept["e0/returns"][pair]
            moved = old + (value - old).clamp(-clip_range, clip_range)
            squares = (value - target) ** 2, (moved - target) ** 2
            loss = 0.5 * torch.maximum(*squares).mean()
            (train["cf_coef"] * loss / accumulation).backward()
            _note(notes, "mb/residual", value)
            _note(notes, "mb/cf_loss", loss)
            _note(notes, "mb/cf_clipfrac", (squares[1] > squares[0]).float().mean())
            _note(notes, "mb/loss", kept[INNER + "mb/pg_loss"][row] + train["cf_coef"] * loss)
        _note(notes, "opt/critic_grad_probe", _vector([q.grad for q in parameters])[probe])
        norm = _vector([q.grad for q in parameters]).double().norm().float()
        _note(notes, "opt/grad_norm_critic", norm)
        for q in parameters:
            q.grad *= (train["max_grad_norm"] / (norm + 1e-6)).clamp(max=1)
        optimizer.step()
        _note(notes, "opt/critic_probe", _vector(parameters)[probe])
        for moment in ("exp_avg", "exp_avg_sq"):
            _note(notes, f"opt/critic_{moment}_probe", _vector([optimizer.state[q][moment] for q in parameters])[probe])
        _note(notes, "opt/critic_norms", torch.stack([q.double().norm() for q in parameters]))
    recorded = {INNER + name: torch.stack(entries) for name, entries in notes.items()}
    recorded |= {f"{INNER}mb/dropout_mask{layer}": mask.float() for layer, mask in enumerate(masks)}
    return recorded | _neurons(kept, parameters)


def _outputs(parameters: list[Tensor], x: Tensor, masks: list[Tensor] | None) -> list[Tensor]:
    outputs = []
    for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        outputs.append(x @ weight.T + bias)
        x = outputs[-1]
        if masks is not None and i < len(DROP):
            x = x * masks[i] / (1 - DROP[i])
    return outputs


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _note(notes: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
    notes.setdefault(name, []).append(value.detach().clone())


def _neurons(kept: Trace, parameters: list[Tensor]) -> dict[str, Tensor]:
    """Activations of the trained critic without dropout; a neuron's score is its mean positive part over the layer's mean."""
    found = {}
    activations = _outputs([q.detach() for q in parameters], kept[INNER + "neuron/embeds"], None)
    for layer, activation in zip(LAYERS[:-1], activations, strict=False):
        positive = activation.clamp(min=0)
        score = positive.mean(dim=0) / (positive.mean() + 1e-9)
        found[f"{INNER}neuron/activation/{layer}"] = positive
        found[f"{INNER}neuron/score/{layer}"] = score
        found[f"{INNER}neuron/dormant_mask/{layer}"] = (score <= kept.config["sample"]["dormant_threshold"]).to(torch.uint8)
    return found


def _counted(epoch: dict, recorded: dict[str, Tensor]) -> dict:
    masks = [tensor for name, tensor in recorded.items() if "/dormant_mask/" in name]
    total, dormant = sum(map(len, masks)), int(sum(mask.sum() for mask in masks))
    counts = {"total_neurons": total, "dormant_neurons": dormant, "dormant_percentage": 100 * dormant / total}
    return {**epoch, "inner": [{**epoch["inner"][0], **counts}]}
