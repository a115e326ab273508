"""Facts about signals: the exit status says which, the finished epochs are on disk, and going on ends as if uninterrupted."""

import itertools
import os
import signal
import threading

import pytest
import tiny
from helpers import tdpo

from tdpo_cli.machine import signals
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.update import Learner

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def ctrl_c():
    """As at a terminal: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    place = tmp_path_factory.mktemp("straight")
    outcome = tdpo("train", "--preset", tiny.preset(place), "--out", place / "run")
    assert outcome.status == 0, outcome.err
    return place / "run"


def send(number):
    os.kill(os.getpid(), number)


MOMENTS = ("rollout", "update", "saving the state", "writing the row")
QUICK = [(signal.SIGTERM, "update")]


@pytest.mark.parametrize(
    "number, moment",
    [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow, id=f"{one[0].name}-{one[1]}") for one in itertools.product(STATUS, MOMENTS)],
)
def test_a_stopped_run_keeps_what_is_finished(tmp_path, straight, monkeypatch, number, moment):
    calls = []

    def once_in_epoch_1(real):
        def wrapped(*arguments, **more):
            calls.append(1)
            if len(calls) == 2:
                send(number)
            return real(*arguments, **more)

        return wrapped

    place, name = {
        "rollout": (Actor, "rollout"), "update": (Learner, "inner_epoch"),
        "saving the state": (RunDir, "save_state"), "writing the row": (RunDir, "log"),
    }[moment]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(place, name, once_in_epoch_1(getattr(place, name)))
        outcome = tdpo("train", "--preset", tiny.preset(tmp_path), "--out", tmp_path / "run")
    assert outcome.status == STATUS[number]
    assert "Traceback" not in outcome.err and "Finished epochs are on disk; continue with tdpo train --resume" in outcome.err
    # an epoch that was computed is saved first, an unfinished one is not
    saved = 1 if moment in ("saving the state", "writing the row") else 0
    assert RunDir(tmp_path / "run").load_state()[0] == saved
    assert tiny.leftovers(tmp_path / "run") == []
    resumed = tdpo("train", "--resume", "--out", tmp_path / "run")
    assert resumed.status == 0, resumed.err
    assert tiny.outcome_of(tmp_path / "run") == tiny.outcome_of(straight)


def test_a_signal_waits_for_the_block_and_handlers_come_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append("delivered"))
    try:
        with signals.held():
            send(signal.SIGTERM)
            seen.append("block done")
        assert seen == ["block done", "delivered"]
        send(signal.SIGTERM)
        assert seen[2:] == ["delivered"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt):
        with signals.held():
            send(signal.SIGINT)
            send(signal.SIGINT)
            raise AssertionError("the second one should have been delivered")


def test_an_error_in_the_block_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError):
        with signals.held():
            send(signal.SIGINT)
            raise ZeroDivisionError


def test_other_threads_than_the_main_one_may_save_too():
    outcome = []

    def save():
        with signals.held():
            outcome.append("saved")

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert outcome == ["saved"]
