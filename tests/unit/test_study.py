"""Facts about the over-optimisation study: its arithmetic by hand, and its tables, redrawn from the result files."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "overoptimisation"))

import analysis  # noqa: E402
import arms  # noqa: E402
from analysis import GOLD, PROXY, Run  # noqa: E402


def run(arm="tdpo", seed=1, proxy=None, gold=None, epochs=20):
    proxy, gold = proxy or [float(i) for i in range(epochs)], gold or [0.0] * epochs
    queries = [48 * (i + 1) for i in range(len(proxy))]
    return Run(arm, seed, 1e-3, {PROXY: proxy, GOLD: gold, "reward_queries": queries, "updates": queries, "mean_kl": proxy})


def test_a_value_at_equal_proxy_is_read_off_where_the_smoothed_proxy_first_gets_there():
    rising = run(gold=[2.0 * i for i in range(20)])
    # windows of five: proxy 2, 3, ..., 17 and gold twice that
    assert rising.at("proxy", 6.5) == pytest.approx(13)
    assert rising.at("proxy", 1.0) == 4.0  # there from the first window on
    assert rising.at("proxy", 18.0) is None
    assert rising.at("queries", 48 * 10) == pytest.approx(2 * 9)


def test_differences_are_paired_by_seed_and_leave_out_who_never_gets_there():
    runs = [run("a", seed, gold=[seed + 1.0] * 20) for seed in (1, 2, 3)] + [run("b", seed, gold=[float(seed)] * 20) for seed in (1, 2)]
    found = analysis.difference(runs, "a", "b", "proxy", 5.0)
    assert (found.mean, found.half, found.count) == (1.0, 0.0, 2)
    assert analysis.difference(runs, "a", "b", "proxy", 99.0) is None


def test_the_interval_is_students():
    found = analysis.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.count) == (3.0, 5)
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5))


def test_gold_turns_where_it_peaks_and_only_if_it_falls():
    peak = [i / 20 if i < 10 else (20 - i) / 20 for i in range(20)]
    assert analysis.turned(peak) == pytest.approx(10, abs=1)
    assert analysis.turned([i / 20 for i in range(20)]) is None
    assert analysis.turned(peak[:9]) is None  # too short to tell


def test_the_learning_rate_is_the_best_of_the_healthy_ones():
    assert arms.best_rate({1e-3: 5.0, 2e-3: 6.0, 4e-3: 7.0}, {1e-3: 0.001, 2e-3: 0.009, 4e-3: 0.02}) == 2e-3


def test_every_arm_is_a_preset_that_loads():
    from tdpo_cli.config import preset as presets

    for arm in (*arms.METHODS, *arms.VARIANTS):
        changes = arms.overrides(arm) | {"update.learning_rate": 1e-3}
        loaded = presets.load(str(ROOT / "benchmarks/overoptimisation/study.toml"), list(changes.items()))
        assert loaded.reward.watch[0] == "gold" and loaded.algorithm.reference


@pytest.mark.slow
def test_the_tables_in_the_docs_are_those_of_the_result_files():
    import draw

    written = (ROOT / "docs/overoptimisation/tables.md").read_text()
    for title, body in draw.tables().items():
        assert f"## {title}\n\n{body}" in written


def test_the_held_out_result_has_every_run_and_says_how_it_was_made():
    found = json.loads((ROOT / "benchmarks/overoptimisation/results/held_out.json").read_text())
    assert found["commit"] and found["tdpo"]
    assert sorted((run["arm"], run["seed"]) for run in found["runs"]) == sorted((arm, seed) for arm in arms.METHODS for seed in arms.SEEDS)


def test_every_result_says_how_it_was_made():

    for file in sorted((ROOT / "benchmarks/overoptimisation/results").glob("*/*.json")):
        found = json.loads(file.read_text())
        assert found["commit"] and found["versions"]["torch"] and found["overrides"]["run.seed"] == found["seed"]
        assert all(len(values) == found["epochs"] for values in found["columns"].values())
