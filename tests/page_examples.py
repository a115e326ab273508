"""Run folders and a cross-evaluation made by hand, as the pages' tests need them."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

from helpers import make_preset
from PIL import Image

from tdpo_cli.storage.run_dir import RunDir, epoch_name

HOSTILE = "</script><script>alert(\"x\")</script><img src=x onerror=alert(1)> & 'quotes'"


def png(size: tuple[int, int] = (552, 204), colour: tuple[int, int, int] = (200, 80, 40), noise: random.Random | None = None) -> bytes:
    """An encoded image; with `noise`, one that hardly compresses."""
    image = Image.new("RGB", size, colour)
    if noise is not None:
        image = Image.frombytes("RGB", size, noise.randbytes(3 * size[0] * size[1]))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def metrics(epoch: int, rewards: tuple[str, ...], critic: bool = True, **changed: Any) -> dict[str, Any]:
    """A row as training writes it: the first reward rises, the others rise and fall again."""
    row: dict[str, Any] = {"epoch": epoch, "reward_queries": 48 * (epoch + 1)}
    for i, name in enumerate(rewards):
        row[f"rewards/{name}/mean"] = (5 + 0.05 * epoch if i == 0 else 0.5 + 0.1 * math.sin(epoch / 7)) + 0.01 * math.sin(9 * epoch + i)
        row[f"rewards/{name}/std"] = 1.1 if i == 0 else 0.06
    row |= {
        "agreement": 0.6 + 0.001 * epoch, "policy_loss": 1e-3,
        "critic_loss": 0.4 if critic else None, "approx_kl": 1e-4 * (1 + epoch % 5), "policy_clip_fraction": 0.03,
        "critic_clip_fraction": 0.2 if critic else None, "policy_grad_norm": 0.05, "critic_grad_norm": 1.1 if critic else None, "ratio_drift": 0.0,
        "skipped_steps": 0, "overflowed_steps": 0, "critic_explained_variance": 0.3 - 0.01 * epoch if critic else None, "updates": 20 * (epoch + 1),
        "dormant_fraction": 0.001 * epoch if critic else None, "dormant_overlap": None, "dormant_fraction_extra": None,
        "reset": (900 if epoch % 10 == 9 else 0) if critic else None, "mean_kl": 0.05 * epoch, "seconds/rollout": 3.1, "seconds/score": 0.2,
        "seconds/update": 2.2, "seconds/total": 5.6, "images_per_second": 8.6, "peak_memory_bytes": 1_100_000_000 + 1_000_000 * epoch,
    }  # fmt: skip
    return row | changed


def make_run(folder: Path, epochs: int = 24, changed: dict[int, dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A run folder with `epochs` rows and images; `changed` by epoch are columns to overwrite."""
    preset = make_preset(
        **{"reward__train": "aesthetic", "reward__watch": ["gold", "pickscore", "hpsv2"], "rollout__samples_per_epoch": 48, "update__batch_size": 24,
           "run__epochs": 24} | settings
    )  # fmt: skip
    run = RunDir(folder)
    run.start(preset)
    run.add_environment({"first_epoch": 0, "tdpo": "0.1.0", "versions": {"torch": "2.5", "peft": None}, "device": "cpu", "device_name": "x86_64"})
    (folder / "images").mkdir()
    (folder / "images" / "before.png").write_bytes(png(colour=(10, 90, 200)))
    for epoch in range(epochs):
        run.log(metrics(epoch, preset.rewards, preset.has_critic, **(changed or {}).get(epoch, {})))
        (folder / "images" / f"{epoch_name(epoch)}.png").write_bytes(png(colour=(200, 8 * epoch % 256, 40)))
    return folder


def estimate(mean: float | None, half: float = 0.2) -> dict[str, float | None]:
    return {"mean": None, "low": None, "high": None} if mean is None else {"mean": mean, "low": mean - half, "high": mean + half}


def make_cross_eval(
    folder: Path, runs: int = 2, checkpoints: int = 4, prompts: int = 12, per_prompt: int = 4, image: bytes | None = None
) -> dict[str, Any]:
    """The content of a cross_eval.json, in `folder` its images: every run trains the first reward up and the others, at last, down."""
    rewards, draw = ["aesthetic", "gold", "pickscore", "imagereward"], random.Random(0)
    texts = [HOSTILE, *(f"a {colour} circle on a blue background" for colour in range(1, prompts))]
    names = [f"run-{number}" for number in range(runs)]

    def model(name: str, run: str | None, step: int, base: str | None) -> dict[str, Any]:
        place = folder / "images" / name
        place.mkdir(parents=True)
        for p in range(prompts):
            for i in range(per_prompt):
                (place / f"{p:04d}-{i:02d}.png").write_bytes(image or png((32, 32), (40 * step % 256, 17 * p % 256, 60 * i % 256)))
        rise = {"aesthetic": 0.5 * step, "gold": -0.2 * step, "pickscore": 0.3 * step - 0.09 * step**2, "imagereward": 0.1 * step}
        entry: dict[str, Any] = {
            "name": name, "base": base, "run": run, "epoch": 5 * step - 1 if run else None, "trained_reward": "aesthetic" if run else None,
            "algorithm": "tdpo-r" if run else None, "reward_queries": 240 * step, "updates": 100 * step, "images": f"images/{name}",
            "scores": {r: [[5 + rise[r] + draw.random() for _ in range(per_prompt)] for _ in range(prompts)] for r in rewards},
            "rewards": {
                r: {
                    "mean": 5 + rise[r], "std": 1.0, "difference": estimate(rise[r]) if base else None,
                    "standardised": estimate(rise[r]) if base else None, "win_rate": estimate(0.5 + 0.4 * math.tanh(rise[r]), 0.05) if base else None,
                }
                for r in rewards
            },
            "diversity": estimate(0.4 - 0.03 * step, 0.02), "diversity_difference": estimate(-0.03 * step, 0.02) if base else None,
            "prompts_all_rise": 0.4 if base else None, "prompts_trained_rises_others_fall": 0.1 * step if base else None,
            "agreement": {"base": estimate(0.8), "model": estimate(0.8 - 0.1 * step), "change": estimate(-0.1 * step)} if base else None,
        }  # fmt: skip
        return entry

    models = [model("base", None, 0, None)]
    models += [model(f"{name}/epoch_{5 * step - 1:04d}", name, step, "base") for name in names for step in range(1, checkpoints + 1)]
    lasts = [next(one for one in reversed(models) if one["run"] == name) for name in names]
    return {
        "tdpo": "0.1.0", "seed": 0, "per_prompt": per_prompt, "prompt_source": "sandbox:held-out", "prompts": texts, "rewards": rewards,
        "bootstrap": {"resamples": 4000, "level": 0.95, "unit": "prompt"}, "models": models,
        "runs": [
            {
                "run": name, "base": "base", "algorithm": "tdpo-r", "trained_reward": "aesthetic",
                "models": [one["name"] for one in models if one["run"] == name],
                "peak_to_final": {r: {"peak_epoch": 9, "peak": 0.4, "final": 0.1, "drop": estimate(0.3)} for r in rewards},
                "verdict": {"kind": "over-optimising", "sentence": "aesthetic +1.10 sd, others -0.30 sd since epoch 9: over-optimising", "since": 9},
            }
            for name in names
        ],
        "matrix": {"trained": names, "evaluated": rewards, "standardised": [[last["rewards"][r]["standardised"] for r in rewards] for last in lasts]},
    }  # fmt: skip
