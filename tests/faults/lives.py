"""Start lives of the command line as forks of this process, which has imported everything already: a second each instead of ten.

A life may get a full disk and a clock that jumps. Its workers are forks as well. `Life.gone` says whether all of them have ended.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from tdpo_cli import cli  # noqa: E402
from tdpo_cli.cli import options  # noqa: E402

options.prepare_libraries()  # before torch is there

import diffusers  # noqa: E402
import nursery  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from tdpo_cli.cross_eval import cross_eval  # noqa: E402, F401
from tdpo_cli.machine import launch  # noqa: E402
from tdpo_cli.sampling import sample  # noqa: E402, F401
from tdpo_cli.score import score  # noqa: E402, F401
from tdpo_cli.train import train  # noqa: E402, F401

_ = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, transformers.CLIPModel  # lazy modules, loaded now
torch.set_num_threads(1)
YEARS = 10 * 365 * 86400.0  # a clock jumps as far as this, forwards or back


class Life:
    """One process of the command line with its workers."""

    def __init__(self, *arguments: object, disk: int | None = None, clock: int | None = None):
        """disk: bytes after which the kernel refuses to make any file longer. clock: the seed of its jumps."""
        self.output, write = os.pipe()
        self.text, self.gone, self.status = b"", False, None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(self.output)
                code = _live(write, [str(argument) for argument in arguments], disk, clock)
            finally:
                os._exit(code)
        os.close(write)

    def ended(self, within: float) -> bool:
        """Wait that long. -> whether the process has ended, with `status`"""
        until = time.monotonic() + within
        while self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = os.waitstatus_to_exitcode(status)
            elif (left := until - time.monotonic()) <= 0:
                return False
            else:
                self._listen(min(left, 0.005))
        return True

    def all_gone(self, within: float) -> bool:
        """Wait that long. -> whether no worker is left: the pipe that all of them hold is closed"""
        until = time.monotonic() + within
        while not self.gone and time.monotonic() < until:
            self._listen(0.05)
        return self.gone

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.ended(60)

    def workers(self) -> list[int]:
        """The processes that it started and that live."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def close(self) -> None:
        os.close(self.output)

    def _listen(self, within: float) -> None:
        if self.gone:
            time.sleep(within)
        elif select.select([self.output], [], [], within)[0]:
            part = os.read(self.output, 1 << 16)
            self.text, self.gone = self.text + part, not part


def _live(output: int, arguments: list[str], disk: int | None, clock: int | None) -> int:
    """-> the exit status that a shell would see"""
    os.dup2(output, 1)
    os.dup2(output, 2)
    launch.PROGRAM = (str(TESTS / "distributed" / "worker.py"),)
    launch.subprocess = types.SimpleNamespace(Popen=nursery.Fork, PIPE=subprocess.PIPE)
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork")  # `score` would start Python anew
    if clock is not None:
        time.time = _jumping(clock)
        time.time_ns = lambda: int(time.time() * 1e9)
    if disk is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself has it
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, resource.RLIM_INFINITY))
    sys.argv = ["tdpo", *arguments]
    code = 70
    try:
        with warnings.catch_warnings():
            cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _jumping(seed: int):
    """A clock that jumps at every third call or so."""
    draw, real, offset = random.Random(seed), time.time, 0.0

    def now() -> float:
        nonlocal offset
        if draw.random() < 0.3:
            offset = draw.uniform(-YEARS, YEARS)
        return real() + offset

    return now
