"""Facts about the benchmarks of scoring, sampling and starting: files, comparisons and parsing."""

import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pairs  # noqa: E402
import score  # noqa: E402
import start  # noqa: E402


def test_ratios_are_of_the_same_round():
    times = {"tdpo": [(1.0, 2.0), (2.0, 4.0)], "loop": [(3.0, 2.0), (2.0, 8.0)]}
    report = pairs.compared(times, "tdpo", 8)
    assert report["loop"]["wall_ratio"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert report["loop"]["cpu_ratio"] == {"median": 1.5, "least": 1.0, "most": 2.0}
    assert report["tdpo"]["images_per_cpu_second"]["most"] == 4.0 and "cpu_ratio" not in report["tdpo"]


def test_cpu_ticks_are_found_behind_a_name_with_brackets():
    assert pairs.cpu_ticks("7 (a) b (c) S 1 1 1 0 -1 0 0 0 0 0 12 30 0 0 20 0") == 42


@pytest.mark.slow
def test_order_of_the_candidates_turns():
    seen = []
    pairs.in_turn({name: lambda name=name: seen.append(name) for name in "abc"}, 2)
    assert "".join(seen) == "abcbca"


@pytest.mark.slow
def test_files_have_mixed_sizes_and_formats(tmp_path):
    paths = score.write_files(tmp_path, 8)
    assert {path.suffix for path in paths} == {".png", ".jpg"}
    assert [Image.open(path).size for path in paths] == list(score.SIZES)


def test_difference_of_scores_is_in_their_standard_deviations():
    assert score.difference([1.0, 3.0], [0.0, 4.0]) == pytest.approx(0.5)


def test_import_times_are_summed_by_library():
    head = "import time: self [us] | cumulative | imported package\n"
    report = head + "import time:       100 |        100 |   torch.a\nimport time:        50 |        150 | torch\n"
    assert start.rows(report) == [("torch.a", 1, 100, 100), ("torch", 0, 50, 150)]
    assert start.by_library(start.rows(report)) == {"torch": 150}


def test_modules_beyond_the_floor_are_those_that_it_does_not_import():
    rows = [("torch", 0, 1, 1), ("tdpo_cli", 0, 2, 2), ("rich", 1, 1, 1)]
    assert [name for name, *_ in start.beyond(rows, rows[:1])] == ["tdpo_cli", "rich"]


@pytest.mark.slow
def test_sampling_imports_nothing_large_beyond_its_pipelines_own():
    _, floor = start.measure(start.PIPELINE)
    _, found = start.measure("import tdpo_cli.sampling.sample")
    beyond = [name for name, *_ in start.beyond(found, floor)]
    libraries = {name.partition(".")[0] for name in beyond} - sys.stdlib_module_names
    assert libraries <= {"tdpo_cli", "rich", "diffusers", "transformers", "tomli", "typing_extensions", "pygments"}
    assert not any("pipelines.flux" in name or "autoencoder_tiny" in name for name in beyond)


@pytest.mark.slow
def test_engine_scores_as_the_loops_do(tmp_path):
    report = score.measure(("aesthetic", "hpsv2"), score.write_files(tmp_path, 9), 4, 1, 1)
    assert set(report) == {"aesthetic", "hpsv2", "aesthetic+hpsv2"}
    assert all(one["agree"] and one["times"]["one at a time"]["cpu_ratio"]["median"] > 0 for one in report.values())


@pytest.mark.slow
def test_engine_makes_the_pipelines_images():
    import sample

    for base in ("sandbox", "sandbox-flow"):
        report = sample.measure(base, 2, 2, 3.0, 2, 1)
        assert report["agree"] and set(report["times"]) == {"tdpo", "one prompt a call", "batches of 2"}
