"""Options and settings that all tests share."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")
# as the command line sets them for itself: tests run it in a process where the libraries are loaded already
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # two threads on a busy machine are 30x slower for tiny models

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--traces", action="append", default=[], metavar="DIR", help="a golden trace's folder; may be repeated")
    parser.addoption("--pipelines", action="append", default=[], metavar="DIR", help="a diffusers folder, or a folder of some; may be repeated")
    parser.addoption("--cpu-times", type=int, default=0, metavar="N", help="list the N tests that used most processor time, and the whole")


# --- processor time -----------------------------------------------------------------------------------------------------
COST = pytest.StashKey[dict[str, float]]()


def cpu_seconds() -> float:
    """User and system time of this process and of its children that ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    start = cpu_seconds()
    try:
        return (yield)
    finally:  # a fixture's share is the first test's that uses it
        item.config.stash.setdefault(COST, {})[item.nodeid] = cpu_seconds() - start


def pytest_terminal_summary(terminalreporter, config):
    if most := config.getoption("--cpu-times"):
        costs = config.stash.get(COST, {})
        terminalreporter.section(f"processor time, {most} of {len(costs)} tests")
        for name in sorted(costs, key=costs.get, reverse=True)[:most]:
            terminalreporter.write_line(f"{costs[name]:8.2f} s  {name}")
        terminalreporter.write_line(f"{sum(costs.values()):8.2f} s  all tests; {cpu_seconds():.1f} s with imports and collection")


@pytest.fixture
def root() -> Path:
    """The top of the source tree."""
    return ROOT
