"""Whole runs of `tdpo train` on each pipeline: they finish, the weights move, and a resumed run is the straight one."""

import json
import math
from pathlib import Path

import pytest
import tiny
from helpers import tdpo
from safetensors.torch import load_file
from subject import GUIDANCE, SIZE, STEPS

LORA = "checkpoints/epoch_{:04d}/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def train(case, tmp_path_factory):
    """Train on the pipeline into a folder of this name, with TDPO-R unless the arguments say otherwise. -> the run folder"""
    place = tmp_path_factory.mktemp("runs")
    changes = {
        "model__base": str(case.path), "model__resolution": list(SIZE), "rollout__steps": STEPS, "rollout__guidance_scale": GUIDANCE,
        "reward__train": "jpeg-incompressibility", "algorithm__name": "tdpo-r", "model__allow_distilled": True,
    }  # fmt: skip
    preset = tiny.preset(place, **changes)

    def run(name, *arguments):
        outcome = tdpo("train", "--preset", preset, "--out", place / name, "--quiet", *arguments)
        assert outcome.status == 0, outcome.err
        return place / name

    return run


@pytest.fixture(scope="module")
def straight(train):
    return train("straight", "--epochs", 2)


def assert_trained(run, epochs):
    rows = tiny.rows(run)
    assert [row["epoch"] for row in rows] == list(range(epochs))
    for row in rows:
        assert row["updates"] > 0 and row["skipped_steps"] == 0
        assert math.isfinite(row["policy_loss"]) and row["policy_grad_norm"] > 0
        assert row["rewards/jpeg-incompressibility/std"] > 0
    assert rows[0]["ratio_drift"] <= 1e-5  # of the first optimizer step: the same weights as in the rollout
    weights = load_file(run / LORA.format(epochs - 1))
    still = {name for name, weight in weights.items() if not weight.any()}
    assert weights and still <= unread(run)  # the zero half of the adapter left 0


# what the last block throws away: what its text tokens attend to, and what becomes of them
LAST = {
    "StableDiffusion3Pipeline": ("attn.add_q_proj",),
    "QwenImagePipeline": ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
}


def unread(run):
    """Weights without a gradient."""
    base = Path(json.loads((run / "preset.json").read_text())["model"]["base"])
    layers = LAST.get(json.loads((base / "model_index.json").read_text())["_class_name"], ())
    last = json.loads((base / "transformer/config.json").read_text())["num_layers"] - 1 if layers else None
    return {f"transformer.transformer_blocks.{last}.{layer}.lora_B.weight" for layer in layers}


@pytest.mark.slow
def test_run_with_a_critic_trains_every_layer(straight):
    assert_trained(straight, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "epochs"), [("ddpo", 1), ("grpo", 2)])
def test_run_without_a_critic_trains_every_layer(train, algorithm, epochs):
    groups = ("--set", "rollout.images_per_prompt=2") if algorithm == "grpo" else ()
    assert_trained(train(algorithm, "--epochs", epochs, "--algorithm", algorithm, *groups), epochs)


@pytest.mark.slow
def test_run_resumed_is_the_straight_run(straight, train):
    run = train("resumed", "--epochs", 1)
    outcome = tdpo("train", "--resume", "--out", run, "--epochs", 2, "--quiet")
    assert outcome.status == 0, outcome.err
    assert [entry["first_epoch"] for entry in json.loads((run / "env.json").read_text())] == [0, 1]
    (rows, weights), (expected_rows, expected_weights) = tiny.outcome_of(run), tiny.outcome_of(straight)
    assert rows == expected_rows
    assert LORA.format(1) in weights and weights == expected_weights
