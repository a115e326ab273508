"""Start one `tdpo` process per GPU or CPU share, pass signals on, and report the first failure once.

The workers run the very command that was given, found by the variables that torchrun sets too (RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so a cluster's own launcher does as well. `accelerate launch --cpu` does not
serve: asked for several processes it starts one and says nothing. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.errors import LostPeer, RequestError, WorkError

PROGRAM = ("-m", "tdpo_cli")
ERROR_FILE = "TDPO_ERROR_FILE"  # where a worker leaves its last words for the launcher; set in workers only
POLL = 0.05  # seconds
SETTLE = 10.0  # seconds a worker that lost its peer waits for the one that is to blame
GRACE = 30.0  # seconds between a signal that was passed on and SIGKILL
PORT = 29500


@dataclass(frozen=True)
class Plan:
    """Which workers to start on this machine. Several machines are torchrun's or the cluster's to start."""

    workers: int
    device: str  # cuda or cpu


def plan(gpus: int | None, processes: int | None) -> Plan:
    """From the flags. Raises RequestError."""
    if gpus and processes:
        raise RequestError("--gpus and --processes exclude each other: workers run on GPUs or on CPUs.")
    return Plan(gpus or processes or 1, "cuda" if gpus else "cpu")


def check(plan: Plan, samples: int) -> None:
    """Whether every worker will have a device and something to do. Raises RequestError."""
    patience()
    if plan.workers > samples:
        raise RequestError(f"{plan.workers} workers for {samples} samples: each needs at least one.")
    if plan.device == "cuda":
        import torch

        if plan.workers > torch.cuda.device_count():
            raise RequestError(f"--gpus {plan.workers}: this machine has {torch.cuda.device_count()} CUDA devices.")


# --- the launcher -------------------------------------------------------------------------------------------------------
def run(plan: Plan, command: Sequence[str]) -> int:
    """Run `tdpo COMMAND` in every worker. -> 0, or 130/143 after a signal. Raises the first failing worker's error."""
    with tempfile.TemporaryDirectory(prefix="tdpo-") as folder:
        team = _Team(plan, command, Path(folder))
        before = {number: signal.signal(number, team.pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return team.work()
        finally:
            team.end()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Team:
    def __init__(self, plan: Plan, command: Sequence[str], folder: Path):
        self.plan, self.command, self.folder = plan, command, folder
        self.workers: dict[int, subprocess.Popen] = {}  # by rank
        self.signal: int | None = None  # that is being passed on
        self.deadline = float("inf")

    def work(self) -> int:
        port = str(_free_port())
        for rank in range(self.plan.workers):
            if self.signal is None:
                self._start(rank, port)
        lost_at = None
        while any(worker.poll() is None for worker in self.workers.values()):
            time.sleep(POLL)
            if self.signal is not None:
                if time.monotonic() > self.deadline:
                    break
                continue
            failed = [rank for rank, worker in self.workers.items() if worker.poll()]
            if failed:
                lost_at = lost_at or time.monotonic()
                if not all(self._words(rank)["lost_peer"] for rank in failed) or time.monotonic() > lost_at + SETTLE:
                    break
        failed = [rank for rank, worker in self.workers.items() if worker.poll()]
        if self.signal is not None:
            return 128 + self.signal if failed or time.monotonic() > self.deadline or len(self.workers) < self.plan.workers else 0
        if failed:
            self._report(min(failed, key=lambda rank: (self._words(rank)["lost_peer"], self._words(rank)["time"])))
        return 0

    def pass_on(self, number: int, frame: object) -> None:
        """The first signal lets the workers finish their step, the second does not wait."""
        self.deadline = time.monotonic() + (GRACE if self.signal is None else 0)
        self.signal = self.signal or number
        for worker in self.workers.values():
            worker.send_signal(number)  # not one that has ended: Popen sees to that

    def end(self) -> None:
        """Nobody stays behind."""
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.kill()
        for worker in self.workers.values():
            worker.wait()
            worker.stdin.close()

    def _start(self, rank: int, port: str) -> None:
        count = str(self.plan.workers)
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, ERROR_FILE: str(self._error_file(rank)),
        }  # fmt: skip
        if "OMP_NUM_THREADS" not in environment:
            environment |= {"OMP_NUM_THREADS": str(max(1, _cores() // self.plan.workers)), "TDPO_THREADS_SHARED": "1"}  # ours, not the user's
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks for the interface of a host name that may not resolve
        spoken = open(self.folder / f"{rank}.txt", "wb")  # of all but the main worker: shown if it is the first to fail
        with spoken:
            self.workers[rank] = subprocess.Popen(
                [sys.executable, *PROGRAM, *self.command], env=environment,
                stdin=subprocess.PIPE,  # never written to: its end tells a worker that the launcher is gone
                stdout=None if rank == 0 else spoken, stderr=None if rank == 0 else spoken,
                start_new_session=True,  # Ctrl-C in a terminal reaches a worker once, through the launcher
            )  # fmt: skip

    def _error_file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _words(self, rank: int) -> dict:
        try:
            return json.loads(self._error_file(rank).read_text())
        except (OSError, ValueError):  # killed, or crashed outside Python
            return {"message": None, "lost_peer": False, "time": 0.0}

    def _report(self, rank: int) -> None:
        """Raise what the worker that failed first had to say."""
        status, message = self.workers[rank].returncode, self._words(rank)["message"]
        if status == 2 and message:
            raise RequestError(message)
        if message is None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            hint = " (the system does that when memory runs out)" if status == -signal.SIGKILL else ""
            spoken = (self.folder / f"{rank}.txt").read_text(errors="replace").strip().splitlines()[-20:]
            message = "\n".join([f"{how}{hint}. The last finished epoch is safe on disk; `tdpo train --resume` goes on from it.", *spoken])
            raise WorkError(f"worker {rank} of {self.plan.workers} {message}")
        raise WorkError(f"worker {rank} of {self.plan.workers}: {message}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- a worker -----------------------------------------------------------------------------------------------------------
def is_worker() -> bool:
    """Whether this process was started as one of several, by `run` or by a cluster's launcher."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ)


def is_main() -> bool:
    return not is_worker() or os.environ["RANK"] == "0"


def check_environment() -> None:
    """RequestError unless a launcher's variables are whole numbers that fit each other, and TDPO_TIMEOUT is a time."""
    patience()
    found = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for name, text in found.items():
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise RequestError(f"{name}={text}: expected a whole number, as torchrun sets it. Unset RANK, LOCAL_RANK and WORLD_SIZE to start alone.")
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise RequestError(f"RANK={found['RANK']} with WORLD_SIZE={found['WORLD_SIZE']}: a rank is below the number of processes.")


def patience() -> float:
    """Minutes that a process waits for the others before it gives up. Raises RequestError."""
    text = os.environ.get("TDPO_TIMEOUT", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 1e6:
        raise RequestError(f"TDPO_TIMEOUT={text}: expected a number of minutes, above 0.")
    return minutes


def restarted() -> bool:
    """Whether torchrun started this worker again after a failure (`--max-restarts`): the run then continues by itself."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def check_world(plan: Plan) -> None:
    """In a worker: whether as many were started as the command asks for. Raises RequestError."""
    check_environment()
    if os.environ["WORLD_SIZE"] != str(plan.workers):
        raise RequestError(
            f"the command asks for {plan.workers} workers, but this process was started as one of {os.environ['WORLD_SIZE']} (WORLD_SIZE)."
        )


def end_with_launcher() -> None:
    """In a worker of `run`: a thread that ends the process when the launcher is gone, however it went."""
    if ERROR_FILE in os.environ:
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def last_words(error: BaseException | None, message: str) -> bool:
    """In a worker of `run`: leave why it failed to the launcher. -> whether there is one, and a disk with room for it"""
    if ERROR_FILE not in os.environ:
        return False
    words = {"message": message, "lost_peer": isinstance(error, LostPeer), "time": time.time()}
    try:
        Path(os.environ[ERROR_FILE]).write_text(json.dumps(words))
    except OSError:  # a full disk: said to standard error instead
        return False
    return True
