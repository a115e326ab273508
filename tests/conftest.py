"""Options and settings that all tests share."""

import atexit
import copy
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")
# as the command line sets them for itself: tests run it in a process where the libraries are loaded already
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
# kept embeddings: the tests' own, also of the processes that they start
os.environ["TDPO_CACHE"] = tempfile.mkdtemp(prefix="tdpo-cache-")
atexit.register(shutil.rmtree, os.environ["TDPO_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # two threads on a busy machine are 30x slower for tiny models

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--traces", action="append", default=[], metavar="DIR", help="a golden trace's folder; may be repeated")
    parser.addoption("--pipelines", action="append", default=[], metavar="DIR", help="a diffusers folder, or a folder of some; may be repeated")
    parser.addoption("--every-variant", action="store_true", help="tests/families: both tiny pipelines of every family")
    parser.addoption("--cpu-times", type=int, default=0, metavar="N", help="list the N tests that used most processor time, and the whole")


def pytest_configure(config):
    import helpers

    helpers.thorough = "not slow" not in config.option.markexpr


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


# --- files of networks ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session", autouse=True)
def embedded_networks_are_read_once():
    """Jobs get fresh copies of what lies in the package's own folder: hundreds of them are built, and reading takes longer than copying.

    Only the first read is a real one. Folders of a test's own are read whenever they are named.
    """
    from tdpo_cli.models import loading
    from tdpo_cli.rewards.backbones import Backbones
    from tdpo_cli.sandbox import ZOO

    component, hold = loading.component, Backbones.hold
    parts, networks = {}, {}  # as they were read; nobody but copy.deepcopy sees these

    def read_or_copied(cls, source, subfolder, revision, **options):
        if source != str(ZOO / "pipeline") or "quantization_config" in options:
            return component(cls, source, subfolder, revision, **options)
        key = (cls, subfolder, revision, *sorted(options.items()))
        if key not in parts:
            parts[key] = component(cls, source, subfolder, revision, **options)
        return copy.deepcopy(parts[key])

    def built_or_copied(self, key, build):
        files = [part for part in key if isinstance(part, Path)] if isinstance(key, tuple) else []
        if not files or not all(file.is_relative_to(ZOO.resolve()) for file in files):
            return hold(self, key, build)

        def copied():
            if key not in networks:
                networks[key] = build()
            return copy.deepcopy(networks[key])

        return hold(self, key, copied)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "component", read_or_copied)
        patch.setattr(Backbones, "hold", built_or_copied)
        yield


@pytest.fixture
def root() -> Path:
    """The top of the source tree."""
    return ROOT
