"""Which traces are replayed: those named with --traces, else the one kept in the project and a made-up one with dropout."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
MADE_UP = "made-up-with-dropout"


def pytest_generate_tests(metafunc):
    if "trace_source" in metafunc.fixturenames:
        from recording import KEPT

        sources = [Path(folder) for folder in metafunc.config.getoption("--traces")] or [KEPT, MADE_UP]
        metafunc.parametrize("trace_source", sources, ids=lambda source: Path(source).name, scope="session")


@pytest.fixture(scope="session")
def dropout_folder(tmp_path_factory):
    """The made-up trace, written anew."""
    import dropout

    return dropout.write(tmp_path_factory.mktemp(MADE_UP))


@pytest.fixture(scope="session")
def trace_folder(trace_source, request):
    return request.getfixturevalue("dropout_folder") if trace_source == MADE_UP else trace_source


@pytest.fixture(scope="session")
def replayed(trace_folder):
    """One replay of the trace, shared by the tests that look at it."""
    from recording import Trace
    from replay import Replay

    if not (trace_folder / "trace.json").is_file():
        pytest.fail(f"{trace_folder}: no trace.json there")
    return Replay(Trace(trace_folder))
