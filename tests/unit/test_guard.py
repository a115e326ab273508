"""Facts about the guard against slower code: what it calls slower, and when it measures once more."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import guard  # noqa: E402
from calls import Calls, Meter  # noqa: E402
from torch import nn  # noqa: E402

COMMITTED = {"ratio": 1.0, "operations": 100}


def judged(*ratios, operations=100):
    """Verdict, and how many pairs each measurement had."""
    asked, answers = [], iter(ratios)
    holds, _ = guard.judge("x", operations, lambda pairs: (asked.append(pairs), next(answers))[1], COMMITTED, pairs=5)
    return holds, asked


def test_guard_measures_once_more_before_it_fails():
    assert judged(1.24) == (True, [5])
    assert judged(1.26, 1.24) == (True, [5, 10])
    assert judged(1.26, 1.26) == (False, [5, 10])


def test_guard_fails_for_more_network_work_without_a_clock():
    assert judged(operations=126) == (False, [])
    assert judged(1.0, operations=125) == (True, [5])


def test_guard_has_a_committed_ratio_of_every_subject(tmp_path):
    assert set(json.loads(guard.COMMITTED.read_text())) == set(guard.subjects(tmp_path))


def test_calls_are_the_outermost_ones_of_each_phase():
    network, meter, calls = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), Meter(), Calls()
    network(torch.ones(4, 2))
    with calls.recording(meter):
        network(torch.ones(4, 2))  # in no phase
        with meter("outer"):
            network(torch.ones(4, 2))
            with meter("inner"), torch.no_grad():
                network(torch.ones(4, 2)), network(torch.zeros(4, 2)), network(torch.ones(5, 2))
    assert {phase: len(keys) for phase, keys in calls.phases.items()} == {"outer": 1, "inner": 3}
    assert len(calls.kinds) == 3  # by shape and mode, not by content
    assert set(meter.phases) == {"outer", "inner"}
    calls.replay("outer")
    assert all(parameter.grad is None for parameter in network.parameters())
    assert set(calls.timed()) == {"outer", "inner"}


@pytest.mark.slow
def test_nothing_is_slower_than_committed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    assert guard.main() == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_planted_slowdown_fails(monkeypatch):
    """Every denoising step wastes as much CPU time as half of the step's network call."""
    committed, name = json.loads(guard.COMMITTED.read_text()), "image sampled, sandbox"
    from tdpo_cli.models.samplers.ddim import DDIM

    subject = guard.sampled("sandbox")
    began = time.process_time()
    subject.bare()
    waste, real = (time.process_time() - began) / guard.STEPS, DDIM.step

    def slow(*arguments):
        until = time.process_time() + waste
        while time.process_time() < until:
            pass
        return real(*arguments)

    monkeypatch.setattr(DDIM, "step", slow)
    holds, line = guard.judge(name, guard.operations(subject), lambda pairs: guard.ratio(subject, pairs), committed[name], pairs=3)
    assert not holds, line


@pytest.mark.slow
def test_a_second_call_of_the_network_fails(monkeypatch):
    from tdpo_cli.models.policy import Policy

    committed, name, real = json.loads(guard.COMMITTED.read_text()), "image sampled, sandbox", Policy.predict
    monkeypatch.setattr(Policy, "predict", lambda *arguments: (real(*arguments), real(*arguments))[1])
    holds, line = guard.judge(name, guard.operations(guard.sampled("sandbox")), lambda pairs: 1.0, committed[name])
    assert not holds and "operations" in line
