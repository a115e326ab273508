"""Facts about the benchmark of full architectures: their sizes, what a section's failure does, and its twin on a CPU."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import epoch  # noqa: E402
import pipelines  # noqa: E402
import whole  # noqa: E402

from tdpo_cli.machine import published  # noqa: E402

# the published models' weights, as the memory plan counts them
WEIGHTS = {
    "sd1": published.SD1_PARAMETERS, "sdxl": published.SDXL_PARAMETERS,
    "sd35": {part: count for part, count in published.TRANSFORMERS["3.5-medium"][1].items() if part != "text_encoder_3"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", list(pipelines.FAMILIES))
def test_full_architecture_has_the_published_number_of_weights(family, tmp_path):
    known = pipelines.FAMILIES[family]
    pipelines.make_tiny.build(known.tiny, tmp_path, known.variant)
    assert set(known.parts) == set(WEIGHTS[family])
    for part, changes in known.parts.items():
        made = pipelines.network(tmp_path / part, changes, "meta")
        assert sum(p.numel() for p in made.parameters()) == pytest.approx(WEIGHTS[family][part], rel=0.005), part


def test_section_that_fails_leaves_the_others_and_late_ones_do_not_begin():
    deadline = whole.Deadline(1)
    assert deadline.section("one", lambda: 1 / 0) == whole.NOT_MEASURED
    assert deadline.section("two", lambda: 2) == 2
    deadline.end = 0
    assert deadline.section("three", lambda: 3) == whole.NOT_MEASURED
    assert list(deadline.failed) == ["one"] and deadline.left_out == ["three"]


def test_parts_follow_from_device_and_size():
    assert epoch._usual_parts("cpu", "tiny") == ["standin"]
    assert epoch._usual_parts("cuda", "sd1") == ["standin", "whole"]
    assert epoch._usual_parts("cuda", "sdxl") == ["whole"]


def assert_measured(report):
    assert report["failed"] == {} and report["left_out"] == []
    for one in report["dtypes"].values():
        assert one["drift_share"] < 0.1
        assert set(one["memory"]) == set(one["mfu"]) == set(whole.PREDICTED)
        assert all(0 < share < 1 for share in one["mfu"].values())
    done = report["commands"]
    assert done["epochs"] == [0, 1, 2] and done["weights_moved"] and done["images"] == len(done["scores"]) == 2
    assert whole.table({"x": report}).count("\n| x |") == 2


@pytest.mark.slow
def test_twin_on_a_cpu_runs_every_section(tmp_path):
    assert_measured(whole.measure("sd35", torch.device("cpu"), tmp_path, False, whole.TINY, False, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(pipelines.FAMILIES))
def test_full_architecture_runs_on_a_gpu(family, tmp_path):
    report = whole.measure(family, torch.device("cuda"), tmp_path, True, whole.FULL[family], False, 9)
    assert_measured(report)
    assert all(held["peak"] < 1.25 * held["predicted"] for one in report["dtypes"].values() for held in one["memory"].values())
