"""Facts about commands that are hurt: whenever a run is killed, and however any command is, going on ends where nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def hurt(program, *arguments):
    process = subprocess.run([sys.executable, str(HERE / program), *map(str, arguments)], capture_output=True, text=True)
    print(process.stdout)  # the counts; pytest -rP shows them
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout)


def kill(times, folder, seed, base="sandbox"):
    counts = hurt("kills.py", folder, "--kills", times, "--seed", seed, "--base", base)
    assert counts["kills"] >= times
    for name in ("epochs_lost", "epochs_doubled", "epochs_sampled_again", "failed_starts", "unequal_runs"):
        assert counts[name] == 0, name


@pytest.mark.slow
def test_a_run_killed_three_times_equals_the_run_that_was_not(tmp_path):
    kill(3, tmp_path, seed=1)


@pytest.mark.slow
def test_a_killed_run_of_a_flow_model_equals_the_run_that_was_not(tmp_path):
    kill(3, tmp_path, seed=3, base="sandbox-flow")


@pytest.mark.slow
def test_no_epoch_is_lost_or_doubled_in_many_kills(tmp_path):
    kill(int(os.environ.get("TDPO_KILLS", "50")), tmp_path, seed=2)


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_mixed_by_several_faults_at_once(tmp_path):
    counts = hurt("campaign.py", tmp_path, "--faults", os.environ.get("TDPO_FAULTS", "15"))
    assert counts["faults"] >= 15 and counts["several at once"] > 0
    assert all(counts[name] > 0 for name in ("train", "sample", "score", "cross-eval", "kill", "worker", "disk", "removed", "away", "clock"))
    for name in ("hung", "tracebacks", "wrong statuses", "left behind", "lost", "too many", "other content"):
        assert counts[name] == 0, name
