"""Start programs as forks of one process that has imported the libraries: each starts in no time instead of in ten seconds.

As a program it takes one request a line, {"program": FILE, "arguments": [...], "environment": {...}, "output": FILE, "errors": FILE}, and
answers with the exit status. Programs run as a shell would run them, except that what they import is there already. `launcher.py`, started
here, forks its workers in the same way.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


class Fork:
    """As much of subprocess.Popen as tdpo_cli/machine/launch.py uses."""

    def __init__(self, command: Sequence[str], env: dict[str, str], stdin: int, stdout: IO | None, stderr: IO | None, start_new_session: bool):
        read, write = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(write)
            os.dup2(read, 0)
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            code = 1
            try:
                if start_new_session:
                    os.setsid()
                code = _live(command[1:], env)
            finally:
                os._exit(code)  # whatever happens: the way up would lead through the launcher's own cleaning up
        os.close(read)
        self.stdin = os.fdopen(write, "wb")

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        return self._look(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _live(program: Sequence[str], environment: dict[str, str]) -> int:
    """Run FILE ARGUMENTS... in this process. -> its exit status"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(program)
    sys.path.insert(0, str(Path(program[0]).parent))
    status: Any = 0
    try:
        runpy.run_path(program[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


class Nursery:
    """The process that forks, as the tests see it."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        self.folder, self.count, self.environment = folder, 0, environment
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(self, *programs: Sequence[object], **environment: str) -> list[subprocess.CompletedProcess]:
        """Run FILE ARGUMENTS... of each at the same time. -> how each ended, with its output"""
        asked = []
        for program in programs:
            self.count += 1
            asked.append({
                "program": [str(part) for part in program], "environment": {**self.environment, **environment},
                "output": str(self.folder / f"{self.count}.out"), "errors": str(self.folder / f"{self.count}.err"),
            })  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        return [
            subprocess.CompletedProcess(one["program"], status, Path(one["output"]).read_text(), Path(one["errors"]).read_text())
            for one, status in zip(asked, ended, strict=True)
        ]

    def tdpo(self, *arguments: object, worker: str = "spy.py", **environment: str) -> subprocess.CompletedProcess:
        """`tdpo ARGUMENTS...` with the launcher's workers forked; each runs `worker`, which lies beside this file."""
        here = Path(__file__).parent
        (done,) = self.run([here / "launcher.py", here / worker, *arguments], **environment)
        return done

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    from tdpo_cli.cli import options

    options.prepare_libraries()  # before torch is there
    import diffusers
    import torch
    import transformers

    from tdpo_cli.cross_eval import cross_eval  # noqa: F401
    from tdpo_cli.sampling import sample  # noqa: F401
    from tdpo_cli.train import train  # noqa: F401

    _ = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, transformers.CLIPModel  # lazy modules, loaded now
    torch.set_num_threads(1)
    for line in sys.stdin:
        children = []
        for one in json.loads(line):
            with open(one["output"], "wb") as output, open(one["errors"], "wb") as errors:
                children.append(Fork([sys.executable, *one["program"]], one["environment"], subprocess.PIPE, output, errors, False))
        print(json.dumps([child.wait() for child in children]), flush=True)


if __name__ == "__main__":
    main()
