"""The spy lies beside the tests: a worker runs it as a program."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Where the workers of all these tests come from."""
    from nursery import Nursery

    place = Nursery(tmp_path_factory.mktemp("nursery"))
    yield place
    place.close()
