"""Facts about killed runs: whenever a run is killed, going on ends where nobody killed it, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "campaign.py"


def kill(times, folder, seed):
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), "--kills", str(times), "--seed", str(seed)], capture_output=True, text=True,
    )  # fmt: skip
    print(process.stdout)  # the counts; pytest -rP shows them
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout)


def check(counts, times):
    assert counts["kills"] >= times
    for name in ("epochs_lost", "epochs_doubled", "epochs_sampled_again", "failed_starts", "unequal_runs"):
        assert counts[name] == 0, name


@pytest.mark.slow
def test_a_run_killed_three_times_equals_the_run_that_was_not(tmp_path):
    check(kill(3, tmp_path, seed=1), 3)


@pytest.mark.slow
def test_no_epoch_is_lost_or_doubled_in_many_kills(tmp_path):
    times = int(os.environ.get("TDPO_KILLS", "50"))
    check(kill(times, tmp_path, seed=2), times)
