"""Facts about the benchmark: its fields, and an equality gate that notices a wrong gradient."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import epoch  # noqa: E402
import growth  # noqa: E402
import ladder  # noqa: E402
import ours  # noqa: E402
import setup  # noqa: E402
import standin  # noqa: E402

SMALL = dataclasses.replace(setup.SIZES["tiny"], samples=4, steps=2, batch=2)
CONTRACT = (
    "training_ratio",
    "sampling_ratio",
    "epoch_ratio",
    "overhead",
    "ratio_drift",
    "standin_ratio_drift",
    "peak_memory_bytes",
    "sizes",
    "spreads",
)


@pytest.fixture(scope="module")
def bench():
    return setup.build(SMALL, torch.device("cpu"))


@pytest.mark.slow
def test_the_benchmark_has_the_contracts_fields_and_its_gate_holds(bench):
    report = json.loads(json.dumps(epoch.measure(bench, 1, with_ladder=True, with_compile=False)))
    assert report["gate"]["holds"], report["gate"]["reasons"]
    assert [name for name in CONTRACT if name not in report] == []
    assert all(report[name] > 0 for name in ("training_ratio", "sampling_ratio", "epoch_ratio", "overhead", "peak_memory_bytes"))
    assert report["spreads"]["training_ratio"]["least"] <= report["training_ratio"] <= report["spreads"]["training_ratio"]["most"]
    assert report["sizes"]["updates_per_epoch"] == report["gate"]["updates"] == report["gate"]["standin_updates"] == 4
    assert set(report["matmul"]["phases"]) == {"denoise", "decode", "train"}
    assert all(row["epoch_gain"] > 0 for row in report["ladder"][1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        lambda gradient: gradient * 1.01,
        *(pytest.param(wrong, marks=pytest.mark.slow) for wrong in (lambda gradient: gradient.roll(1), torch.zeros_like)),
    ],
    ids=["1 % too long", "shuffled", "none"],
)
def test_a_wrong_gradient_of_the_standin_fails_the_gate_and_nothing_is_timed(bench, wrong):
    report = epoch.measure(bench, 1, with_ladder=False, with_compile=False, tamper=wrong)
    assert not report["gate"]["holds"] and "gradient is another one" in report["gate"]["reasons"][0]
    assert "epoch_ratio" not in report


@pytest.mark.slow
def test_a_gradient_of_ours_that_is_worse_fails_the_gate(bench, monkeypatch):
    real = ours.train

    def rounded(*arguments):
        trained = real(*arguments)
        return dataclasses.replace(trained, first_gradient=trained.first_gradient.bfloat16().float())

    monkeypatch.setattr(ours, "train", rounded)
    gate = epoch.measure(bench, 1, with_ladder=False, with_compile=False)["gate"]
    assert not gate["holds"] and "from the reference, the stand-in's" in gate["reasons"][0]


def test_the_standin_makes_tdpos_samples(bench):
    plan = ladder.Plan(4, 4, 4)
    own, theirs = ours.sample(bench, plan), standin.sample(bench, standin.OFFICIAL)
    assert own.prompts == theirs.prompts
    for name in ("latents", "log_probs", "images", "values"):
        assert torch.allclose(getattr(own, name), getattr(theirs, name), atol=1e-4), name
    # preprocessing by PIL and on the device
    assert torch.allclose(own.image_embeds, theirs.image_embeds, atol=1e-4)


@pytest.mark.slow
def test_every_way_of_the_ladder_makes_the_same_gradient(bench):
    plan, order = ladder.Plan(4, 4, 4), ours.order(bench)
    bench.restart()
    trajectory = ours.sample(bench, plan)
    credit = ours.credit(bench, trajectory, ours.score(bench, trajectory))
    gradients = []
    for ways in (
        standin.OFFICIAL,
        standin.Ways(materialised_attention=True, micro_batch=2), standin.Ways(cpu_coefficients=False, device_pixels=True, deferred_look=True),
    ):  # fmt: skip
        bench.restart()
        standin.attention(bench, ways.materialised_attention)
        gradients.append(standin.train(bench, ways, trajectory, credit, order).first_gradient)
    standin.attention(bench, False)
    bench.restart()
    assert gradients[0].norm() > 0
    assert all((one - gradients[0]).norm() < 1e-3 * gradients[0].norm() for one in gradients[1:])


@pytest.mark.slow
def test_the_full_architecture_is_constructed_without_numbers():
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "epoch.py"), "--size", "sd1", "--dry", "--json"], capture_output=True, text=True, check=True, timeout=300
    )
    facts = json.loads(run.stdout)
    assert 859e6 < facts["parameters"]["UNet2DConditionModel"] < 861e6  # Stable Diffusion 1.x with a LoRA of rank 4
    assert facts["trajectory_bytes_per_step_and_sample"] <= 69e3


@pytest.mark.slow
def test_memory_grows_by_the_stored_trajectory_only(monkeypatch):
    """One more step of a sample costs its latent and its embedding, and no more numbers than 69 kB leave room for at 512 pixels."""
    report = growth.measure(torch.device("cpu"), 1, {"steps": (2, 4, 6)})
    per_pair, stored = report["axes"]["steps"]["bytes_per_step_and_sample"], report["axes"]["steps"]["points"][0]["stored_bytes_per_step_and_sample"]
    assert stored * 0.9 < per_pair < stored + 69_000 - 4 * (4 * 64 * 64 + 768)


@pytest.mark.slow
def test_reduced_full_size_path_runs_on_a_cpu():
    bench = setup.build(dataclasses.replace(setup.SIZES["sd1-small"]), torch.device("cpu"))
    report = epoch.measure(bench, 1, with_ladder=False, with_compile=False)
    assert report["gate"]["holds"], report["gate"]["reasons"]


@pytest.mark.gpu
def test_the_full_size_runs_on_a_gpu():
    bench = setup.build(dataclasses.replace(setup.SIZES["sd1"], samples=16, steps=4), torch.device("cuda"))
    report = epoch.measure(bench, 1, with_ladder=False, with_compile=False)
    assert report["gate"]["holds"], report["gate"]["reasons"]
    assert report["epoch_ratio"] > 1 and 0 < report["matmul"]["phases"]["train"]["share"] < 1
