"""Whole runs of `tdpo train` on each pipeline: they finish, the weights move, and a resumed run is the straight one."""

import json
import math

import pytest
import tiny
from helpers import tdpo
from safetensors.torch import load_file
from subject import GUIDANCE, SIZE, STEPS

from tdpo_cli.config.preset import Model

LORA = "checkpoints/epoch_0001/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["tdpo-r", "ddpo"])
def train(case, request, tmp_path_factory):
    """Train on the pipeline into a folder of this name. -> the run folder"""
    place = tmp_path_factory.mktemp("runs")
    changes = {
        "model__base": str(case.path), "model__resolution": list(SIZE), "rollout__steps": STEPS, "rollout__guidance_scale": GUIDANCE,
        "reward__train": "jpeg-incompressibility", "algorithm__name": request.param,
    }  # fmt: skip
    if hasattr(Model, "allow_distilled"):
        changes["model__allow_distilled"] = True
    preset = tiny.preset(place, **changes)

    def run(name, *arguments):
        outcome = tdpo("train", "--preset", preset, "--out", place / name, "--quiet", *arguments)
        assert outcome.status == 0, outcome.err
        return place / name

    return run


@pytest.fixture(scope="module")
def straight(train):
    return train("straight", "--epochs", 2)


def test_run_trains_the_policy(straight):
    rows = tiny.rows(straight)
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert row["updates"] > 0 and row["skipped_steps"] == 0
        assert math.isfinite(row["policy_loss"]) and row["policy_grad_norm"] > 0
        assert row["rewards/jpeg-incompressibility/std"] > 0
    assert rows[0]["ratio_drift"] <= 1e-5  # of the first optimizer step: the same weights as in the rollout
    assert all(weight.any() for weight in load_file(straight / LORA).values())  # the zero half of the adapter left 0


def test_run_resumed_is_the_straight_run(straight, train):
    run = train("resumed", "--epochs", 1)
    outcome = tdpo("train", "--resume", "--out", run, "--epochs", 2, "--quiet")
    assert outcome.status == 0, outcome.err
    assert [entry["first_epoch"] for entry in json.loads((run / "env.json").read_text())] == [0, 1]
    (rows, weights), (expected_rows, expected_weights) = tiny.outcome_of(run), tiny.outcome_of(straight)
    assert rows == expected_rows
    assert LORA in weights and weights == expected_weights
