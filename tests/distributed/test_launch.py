"""Facts about the launcher: the first failure said once, signals passed on, nobody left behind. Its workers here are small programs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tdpo

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine import launch

ROOT = Path(__file__).parent.parent.parent
TRAIN = ("train", "--preset", "quickstart")
# what every worker does first, as the command line does
BEGIN = """
import os, signal, sys, time
from pathlib import Path
from tdpo_cli.machine import launch
from tdpo_cli.errors import LostPeer, RequestError, WorkError
launch.end_with_launcher()
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
(folder / f"{rank}.pid").write_text(str(os.getpid()))
def fail(error, status):
    launch.last_words(error, str(error))
    sys.exit(status)
"""
WAIT = "\ntime.sleep(60)"


def run(monkeypatch, folder, program, workers=2):
    monkeypatch.setattr(launch, "PROGRAM", ("-c", BEGIN + program))
    return launch.run(launch.Plan(workers, "cpu"), [str(folder)])


def alive(folder):
    """The workers that still run."""
    return [file for file in folder.glob("*.pid") if _runs(int(file.read_text()))]


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # one that ended and was not waited for yet does not count
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# --- how a run ends -----------------------------------------------------------------------------------------------------
def test_each_worker_knows_its_place_and_success_is_0(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS")
    program = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
(folder / f"{rank}.txt").write_text(" ".join(os.environ[name] for name in names) + " " + os.environ["OMP_NUM_THREADS"])
"""
    assert run(monkeypatch, tmp_path, program, workers=3) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)] == [f"{rank} {rank} 3 3 127.0.0.1 {threads}" for rank in range(3)]


def test_the_worker_that_failed_first_is_reported_once_and_the_others_end(monkeypatch, tmp_path, capfd):
    program = "if rank == 1: fail(WorkError('reward aesthetic gave nonsense.'), 1)" + WAIT
    start = time.monotonic()
    with pytest.raises(WorkError, match=r"^worker 1 of 2: reward aesthetic gave nonsense\.$"):
        run(monkeypatch, tmp_path, program)
    assert time.monotonic() - start < 20
    assert alive(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_a_wrong_request_stays_one(monkeypatch, tmp_path):
    with pytest.raises(RequestError, match=r"^no such model\.$"):
        run(monkeypatch, tmp_path, "fail(RequestError('no such model.'), 2)")


def test_the_one_to_blame_is_reported_not_those_that_lost_it(monkeypatch, tmp_path):
    program = "if rank == 0: fail(LostPeer('lost another process'), 1)\ntime.sleep(1)\nfail(WorkError('out of memory'), 1)"
    with pytest.raises(WorkError, match="^worker 1 of 2: out of memory$"):
        run(monkeypatch, tmp_path, program)


def test_a_lost_peer_elsewhere_is_said_after_a_while(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "SETTLE", 0.5)
    with pytest.raises(WorkError, match="^worker 0 of 2: lost another process$"):
        run(monkeypatch, tmp_path, "if rank == 0: fail(LostPeer('lost another process'), 1)" + WAIT)
    assert alive(tmp_path) == []


def test_a_killed_worker_is_named_with_the_signal(monkeypatch, tmp_path):
    program = "print('last line', flush=True)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)" + WAIT
    with pytest.raises(WorkError, match=r"(?s)^worker 1 of 2 was killed by SIGKILL \(the system.*safe on disk.*last line$"):
        run(monkeypatch, tmp_path, program)
    assert alive(tmp_path) == []


# --- signals and orphans ------------------------------------------------------------------------------------------------
@pytest.fixture
def launcher(tmp_path):
    """A launcher in a process of its own, with two workers that are up."""
    started = []

    def start(program):
        code = f"""
import sys
from tdpo_cli import cli
from tdpo_cli.machine import launch
launch.PROGRAM = ("-c", {BEGIN + program!r})
launch.check = lambda *arguments: None
launch.run = lambda plan, command, run=launch.run: run(plan, [{str(tmp_path)!r}])
cli.main()
"""
        command = [sys.executable, "-c", code, *TRAIN, "--processes", "2", "--out", str(tmp_path / "run")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        started.append(process)
        wait_for(lambda: len(list(tmp_path.glob("*.up"))) == 2)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


UP = "(folder / f'{rank}.up').touch()"


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_worker_once_and_is_the_exit_status(launcher, tmp_path, number, status):
    program = f"""
def stop(number, frame):
    with open(folder / f"{{rank}}.signals", "a") as file:
        file.write(f"{{number}} ")
    time.sleep(0.3)  # saves what is finished
    sys.exit(128 + number)
signal.signal({int(number)}, stop)
{UP}
{WAIT}
"""
    process = launcher(program)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert err.strip() == "tdpo: stopped. Finished epochs are on disk; continue with tdpo train --resume --out RUN."
    assert [(tmp_path / f"{rank}.signals").read_text() for rank in (0, 1)] == [f"{int(number)} "] * 2
    assert alive(tmp_path) == []


@pytest.mark.slow
def test_workers_that_do_not_listen_are_ended_by_the_second_signal(launcher, tmp_path):
    process = launcher(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{UP}\n{WAIT}")
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert alive(tmp_path) == []


@pytest.mark.slow
def test_workers_end_with_a_launcher_that_was_killed(launcher, tmp_path):
    process = launcher(f"{UP}\n{WAIT}")
    assert len(alive(tmp_path)) == 2
    process.kill()
    wait_for(lambda: alive(tmp_path) == [])


# --- what is refused before anything starts -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--gpus", 40), r"--gpus 40: this machine has \d+ CUDA devices\."),
        (("--processes", 64), r"64 workers for 48 samples: each needs at least one\."),
        (("--processes", 2, "--gpus", 2), r"--gpus and --processes exclude each other.*"),
    ],
)
def test_a_wrong_request_is_one_message_before_anything_starts(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = tdpo(*TRAIN, *flags)
    assert (outcome.status, outcome.out, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(f"tdpo: {message}\n", outcome.err), outcome.err


def test_a_worker_checks_that_the_world_is_as_large_as_was_asked(monkeypatch, tmp_path):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    outcome = tdpo(*TRAIN, "--processes", 2, "--out", tmp_path / "run")
    assert (outcome.status, outcome.err) == (
        2, "tdpo: the command asks for 2 workers, but this process was started as one of 1 (WORLD_SIZE).\n"
    )  # fmt: skip


@pytest.mark.parametrize(("count", "again"), [(None, False), ("0", False), ("2", True)])
def test_a_worker_that_torchrun_restarted_resumes(count, again, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert launch.restarted() is again


# --- workers that lose each other -----------------------------------------------------------------------------------------
MEET = """
from tdpo_cli.machine import world
here = world.current("cpu")
assert (here.rank, here.size) == (rank, 2)
"""
BARRIER = """
try:
    here.barrier()
except LostPeer as error:
    fail(error, 1)
"""
LEAD = """
import sys, types
import nursery
from tdpo_cli.errors import WorkError
from tdpo_cli.machine import launch
launch.PROGRAM, launch.SETTLE = (sys.argv[1],), 1.0
launch.subprocess = types.SimpleNamespace(Popen=nursery.Fork, PIPE=-1)
try:
    launch.run(launch.Plan(2, "cpu"), [sys.argv[2]])
except WorkError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "second, timeout, message",
    [
        ("time.sleep(60)", "0.05", r"worker 0 of 2: lost another process of the run while exchanging a barrier: .*0\.05 minutes \(TDPO_TIMEOUT"),
        ("fail(WorkError('my own fault'), 1)", "5", "worker 1 of 2: my own fault"),
    ],
)
def test_a_silent_or_failed_peer_never_hangs_the_others(second, timeout, message, nursery, tmp_path):
    (tmp_path / "worker.py").write_text(BEGIN + MEET + f"if rank == 1: {second}" + BARRIER)
    (tmp_path / "lead.py").write_text(LEAD)
    (done,) = nursery.run([tmp_path / "lead.py", tmp_path / "worker.py", tmp_path], TDPO_TIMEOUT=timeout)
    assert re.match(message, done.stdout), done.stdout + done.stderr
    assert alive(tmp_path) == []
