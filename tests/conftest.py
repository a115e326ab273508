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


@pytest.fixture
def root() -> Path:
    """The top of the source tree."""
    return ROOT
