"""Load on `tdpo serve`: clients score small images while the server is killed and started again. No row may be lost or wrong.

    python benchmarks/serve_load.py [--clients 4] [--images 10000] [--kills 2] [--reward jpeg-compressibility]

Every client checks each score against the reward computed in this process. Prints one JSON object: rows, wrong rows, images a second,
and the server's memory after its first and its last requests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from tdpo_cli import rewards
from tdpo_cli.rewards.backbones import Backbones

SIDE, BATCH, DIFFERENT = 64, 10, 50  # pixels; images a request; requests that differ
PROMPT = "a red circle on a blue background"


class Clients:
    """Threads that score the same images again and again, each over its own connection."""

    def __init__(self, url: str, expected: dict[int, list[float]], batches: list[torch.Tensor], share: list[range]):
        self.url, self.expected, self.batches = url, expected, batches
        self.rows, self.wrong, self.failures = 0, 0, []
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._work, args=(numbers,)) for numbers in share]

    def _work(self, numbers: range) -> None:
        try:
            reward = rewards.load(self.url, Backbones())
            for number in numbers:
                which = number % len(self.batches)
                scores = reward.score(self.batches[which], [PROMPT] * BATCH).tolist()
                wrong = sum(abs(one - other) > 1e-5 for one, other in zip(scores, self.expected[which], strict=True))
                with self.lock:
                    self.rows += len(scores)
                    self.wrong += wrong
        except Exception as error:  # noqa: BLE001 - reported with the figures
            self.failures.append(f"{type(error).__name__}: {error}")


def start(arguments: argparse.Namespace, port: int) -> tuple[subprocess.Popen, str]:
    """A server that listens -> the process, the reward's address."""
    command = [sys.executable, "-m", "tdpo_cli", "serve", arguments.reward, "--zoo", "sandbox", "--port", str(port), "--device", "cpu", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, json.loads(server.stdout.readline())["urls"][arguments.reward]


def resident(process: subprocess.Popen) -> float:
    """Memory in MiB, from /proc: Linux only."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--reward", default="jpeg-compressibility")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), generator=draw) / 255 for _ in range(DIFFERENT)]
    here = rewards.load(arguments.reward, Backbones(), checkpoint=rewards.checkpoints("sandbox", {}).get(arguments.reward))
    expected = {number: here.score(batch, [PROMPT] * BATCH).tolist() for number, batch in enumerate(batches)}

    requests = arguments.images // BATCH
    share = [range(number, requests, arguments.clients) for number in range(arguments.clients)]
    server, url = start(arguments, 0)
    port = int(url.split(":")[2].split("/")[0])
    clients = Clients(url, expected, batches, share)
    began, killed, memory = time.perf_counter(), [], []
    for thread in clients.threads:
        thread.start()
    while any(thread.is_alive() for thread in clients.threads):
        time.sleep(0.2)
        if len(killed) < arguments.kills and clients.rows >= (len(killed) + 1) * arguments.images // (2 * arguments.kills + 1):
            server.kill()
            server.wait()
            killed.append(clients.rows)
            server, _ = start(arguments, port)
        elif len(killed) == arguments.kills:  # memory of the server that stays to the end
            memory.append((clients.rows, resident(server)))
    seconds = time.perf_counter() - began
    server.send_signal(signal.SIGTERM)
    status = server.wait(60)
    after_first = [mib for rows, mib in memory if rows > (killed[-1] if killed else 0) + 500] or [float("nan")]
    print(json.dumps({
        "reward": arguments.reward, "clients": arguments.clients, "rows": clients.rows, "wanted": requests * BATCH, "wrong": clients.wrong,
        "failures": clients.failures, "killed_after_rows": killed, "seconds": round(seconds, 1),
        "images_per_second": round(clients.rows / seconds, 1),
        "server_mib": {
            "after 500 images": round(after_first[0], 1), "highest": round(max(after_first), 1), "last": round(after_first[-1], 1),
        },
        "exit_status": status,
    }))  # fmt: skip
    return int(bool(clients.failures) or clients.wrong > 0 or clients.rows != requests * BATCH)


if __name__ == "__main__":
    raise SystemExit(main())
