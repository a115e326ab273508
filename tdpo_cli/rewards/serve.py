"""Answer the protocol of docs/rewards.md with rewards of this process: `tdpo serve`.

One thread a connection reads, checks and answers; one thread scores for all of them, as the networks share a device. Connections, the
bodies in memory and their sizes are bounded, so memory does not grow with the number of clients.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from tdpo_cli import __version__, rewards
from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.rewards import protocol, scoring
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.protocol import BadMessage

CONNECTIONS = 64  # at once; more are closed
BODIES = 4  # read or in memory at once; the others wait
SILENCE = 60.0  # seconds: a connection on which nothing arrives for so long is closed
BATCH = 64  # images that a reward gets at once
LAST_REQUESTS = 30.0  # seconds: how long a server that was told to stop lets running requests finish


class Offer:
    """A reward with its place on the server and what its description says."""

    def __init__(self, path: str, reward: rewards.Reward):
        self.path, self.reward = path, reward
        said = reward.describe()
        digests = {Path(file).name: digest for file, digest in said["sha256"].items()}  # names: a client need not know this disk
        state = {**said, "sha256": digests, "checkpoint": None}
        mark = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.version = f"tdpo {__version__} {mark}"  # other weights or settings are another version
        self.description = {
            "protocol": protocol.PROTOCOL, "version": self.version, "reward": Path(reward.name).name, "needs_prompt": reward.needs_prompt,
            "encodings": list(protocol.ENCODINGS), "scale": said["scale"], "variant": said["variant"], "sha256": digests,
        }  # fmt: skip


def offers(names: Sequence[str], device: str | None, checkpoints: Mapping[str, str], variant: str) -> list[Offer]:
    """Load rewards and give each its path. Raises RequestError."""
    from tdpo_cli.machine import world

    paths = [path_of(name) for name in names]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise RequestError(f"two rewards would both be served at {min(twice)}; serve them on two ports.")
    loaded = scoring.load_rewards(names, Backbones(world.device(device)), checkpoints, variant)
    return [Offer(path, reward) for path, reward in zip(paths, loaded.values(), strict=True)]


def path_of(name: str) -> str:
    """The path of a reward on the server: its name, or of a user's own the function's. Raises RequestError."""
    rewards.check_name(name)
    if protocol.is_address(name):
        raise RequestError(f"{name} is served already; name a built-in reward or your own.")
    return "/" + name.rpartition(":")[2]


class Scorer:
    """One thread that scores. Threads of torch's own belong to the thread that uses them: one for every connection would be too many."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[tuple[Future, Callable[[], list[float]]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(torch.get_num_threads(),), daemon=True).start()

    def do(self, task: Callable[[], list[float]]) -> list[float]:
        """What `task` returns or raises, after all tasks before it."""
        future: Future = Future()
        self.tasks.put((future, task))
        return future.result()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            future, task = self.tasks.get()
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 - it is the request's, and this thread must live
                future.set_exception(error)
            del future, task  # and the images with them


class Server(ThreadingHTTPServer):
    """Bound and listening from the start; `run` answers."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], offered: Sequence[Offer], max_body: int, device: torch.device | str = "cpu"):
        self.offered = {one.path: one for one in offered}
        self.max_body, self.device = max_body, torch.device(device)
        self.scorer, self.bodies = Scorer(), threading.BoundedSemaphore(BODIES)
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.idle, self.running, self.stopping = threading.Condition(), 0, False
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, Handler)
        except (OSError, OverflowError) as error:
            raise RequestError(f"cannot listen on {address[0]}, port {address[1]}: {first_line(error)}.") from None

    @property
    def urls(self) -> dict[str, str]:
        """Reward -> where it is."""
        host, port = self.server_address[:2]
        return {one.reward.name: f"http://{f'[{host}]' if ':' in host else host}:{port}{path}" for path, one in self.offered.items()}

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service for this host, which can take long
        self.server_name, self.server_port = self.server_address[:2]

    # --- connections ------------------------------------------------------------------------------------------------------
    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)  # the client asks again later
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report faults of the server; a client that went away is not reported."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    # --- requests ---------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def counted(self) -> Iterator[bool]:
        """While one request is answered; False where the server is stopping and takes no more."""
        with self.idle:
            taken = not self.stopping
            self.running += taken
        try:
            yield taken
        finally:
            with self.idle:
                self.running -= taken
                self.idle.notify_all()

    def scores(self, offer: Offer, body: bytes) -> list[float]:
        """What the reward says of the images of a request. Raises BadMessage, and whatever the reward raises."""
        pixels, prompts = protocol.read_question(body, self.max_body)
        name = offer.reward.name

        def task() -> list[float]:
            images = torch.tensor(pixels, device=self.device).permute(0, 3, 1, 2).contiguous()  # as everywhere else: sums depend on it
            parts = [
                scoring.score_images({name: offer.reward}, images[start : start + BATCH].float().div_(255), prompts[start : start + BATCH], BATCH)
                for start in range(0, len(images), BATCH)
            ]
            return torch.cat([part[name] for part in parts]).tolist()

        return self.scorer.do(task)

    def run(self) -> None:
        """Answer until SIGTERM or Ctrl-C; let running requests finish. In the main thread."""
        stop = threading.Event()
        before = {number: signal.signal(number, lambda number, frame: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
        loop = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        loop.start()
        try:
            while not stop.wait(0.2):  # a wait without end keeps signals from some platforms' main thread
                pass
        finally:
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Take no more requests, let the running ones finish, close."""
        until = time.monotonic() + LAST_REQUESTS
        with self.idle:
            self.stopping = True
        self.shutdown()
        with self.idle:
            while self.running and (left := until - time.monotonic()) > 0:
                self.idle.wait(left)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection: requests one after another."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"tdpo/{__version__}", ""
    timeout = SILENCE
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet where it fits

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends the body
        return going_on

    def do_GET(self) -> None:
        everything = {"protocol": protocol.PROTOCOL, "version": f"tdpo {__version__}"}
        if self.path == "/":
            self._send(200, everything | {"rewards": {path: one.description for path, one in self.server.offered.items()}})
        elif offer := self.server.offered.get(self.path):
            self._send(200, offer.description)
        else:
            self._unknown()

    def do_POST(self) -> None:
        with self.server.counted() as taken:
            if not taken:
                self._refuse(503, "the server is stopping")
                return
            self._answer()

    def _answer(self) -> None:
        offer, length = self.server.offered.get(self.path), self.headers.get("Content-Length", "")
        if offer is None:
            self._unknown()
        elif not length.isascii() or not length.isdigit() or "Transfer-Encoding" in self.headers:
            self._refuse(411, "a request needs a Content-Length")
        elif len(length) > 15 or int(length) > self.server.max_body * 4 // 3 + 65536:  # base64, and room for prompts
            self._refuse(413, f"at most {self.server.max_body:,} bytes of pixels in one request; send fewer images at a time")
        elif self.headers.get_content_type() != "application/json":  # which no web page can send here unasked
            self._refuse(415, "Content-Type: expected application/json")
        else:
            with self.server.bodies:
                self._score(offer, int(length))

    def _score(self, offer: Offer, length: int) -> None:
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True  # the client is gone
            return
        try:
            scores = self.server.scores(offer, body)
        except (BadMessage, RequestError) as error:
            self._send(400, {"error": str(error)})
        except Exception as error:
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            self._send(503 if memory else 500, {"error": f"{type(error).__name__}: {first_line(error)}"})
        else:
            self._send(200, protocol.answer(scores, offer.version))

    def _unknown(self) -> None:
        self._refuse(404, f"no reward here; there are: {', '.join(self.server.offered)}")

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # the body was not read
        self._send(status, {"error": why})

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """No line per request."""
