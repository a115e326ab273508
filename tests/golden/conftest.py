"""Which traces are replayed: those named with --traces, else the two kept in the project and a made-up one with dropout."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
MADE_UP = "made-up-with-dropout"


def pytest_generate_tests(metafunc):
    if "trace_source" in metafunc.fixturenames:
        from flow_recording import KEPT_FLOW
        from recording import KEPT

        own = [KEPT, pytest.param(MADE_UP, marks=pytest.mark.slow), pytest.param(KEPT_FLOW, marks=pytest.mark.slow)]
        sources = [Path(folder) for folder in metafunc.config.getoption("--traces")] or own
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
    """One replay of the trace, shared by the tests that look at it: of TDPO or of Flow-GRPO, as its trace.json says."""
    from flow_recording import FlowTrace, is_flow
    from flow_replay import FlowReplay
    from recording import Trace
    from replay import Replay

    if not (trace_folder / "trace.json").is_file():
        pytest.fail(f"{trace_folder}: no trace.json there")
    return FlowReplay(FlowTrace(trace_folder)) if is_flow(trace_folder) else Replay(Trace(trace_folder))
