"""Which traces are replayed: those named with --traces, else the one kept in the project."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_generate_tests(metafunc):
    if "trace_folder" in metafunc.fixturenames:
        from recording import KEPT

        folders = [Path(folder) for folder in metafunc.config.getoption("--traces")] or [KEPT]
        metafunc.parametrize("trace_folder", folders, ids=lambda folder: folder.name, scope="session")


@pytest.fixture(scope="session")
def replayed(trace_folder):
    """One replay of the trace, shared by the tests that look at it."""
    from recording import Trace
    from replay import Replay

    if not (trace_folder / "trace.json").is_file():
        pytest.fail(f"{trace_folder}: no trace.json there")
    return Replay(Trace(trace_folder))
