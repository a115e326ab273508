"""A reward behind HTTP: pictures and prompts go out, scores come back, or the work stops with one message. Never a wrong row."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdpo_cli.errors import RewardError, WorkError, first_line
from tdpo_cli.rewards import protocol
from tdpo_cli.rewards.preprocess import quantise
from tdpo_cli.rewards.protocol import Address, BadMessage

TIMEOUT = "TDPO_REWARD_TIMEOUT", 120.0  # seconds for one answer
PATIENCE = "TDPO_REWARD_PATIENCE", 300.0  # seconds for which a server that does not answer is asked again
FIRST_PATIENCE = 10.0  # ... before the first answer: the address may be wrong
PAUSES = 0.25, 15.0  # seconds before the second attempt, doubled each time; at most
BAD_ANSWERS = 3  # to one question: an answer may be cut off by a server that stops, a third time means a fault
MAX_QUESTION = 24 << 20  # bytes of pixels in one request: 32 MiB as base64
MAX_ANSWER = 4 << 20
_TRY_AGAIN = {408, 429, 502, 503, 504}  # the server is busy, starting or stopping

Answer = TypeVar("Answer")


class HttpReward:
    """A server's scores. One connection, kept open; a new one after every failure, so that no late answer is taken for the next."""

    def __init__(self, name: str):
        """Ask the server who it is. Raises RewardError if it does not answer."""
        self.name = name
        self.address = protocol.address(name)
        self.timeout, self.patience = _seconds(*TIMEOUT), _seconds(*PATIENCE)
        self.connection: http.client.HTTPConnection | None = None
        try:
            self.description = self._asked("GET", None, protocol.read_description, min(FIRST_PATIENCE, self.patience))
        except WorkError as error:
            raise RewardError(f"{error} Start the server, or correct the address; docs/rewards.md has the protocol.") from None
        self.needs_prompt = self.description["needs_prompt"]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32, NaN where the server gave null. Raises RewardError, WorkError."""
        pixels = quantise(images).byte().permute(0, 2, 3, 1).cpu().numpy()
        step = max(1, MAX_QUESTION // max(1, pixels[:1].nbytes))
        scores: list[float] = []
        for start in range(0, len(pixels), step):
            scores += self._scores(pixels[start : start + step], prompts[start : start + step])
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def describe(self) -> dict[str, Any]:
        said = self.description
        return {
            "checkpoint": self.address.url,
            "sha256": {},
            "variant": said.get("variant", "the server's own"),
            "preprocessing": {"resize": "the server's own"},
            "scale": said.get("scale", "the server's own"),
            "version": said["version"],
        }

    def _scores(self, pixels: Any, prompts: Sequence[str]) -> list[float]:
        body = protocol.question(pixels, prompts, self.description["encoding"])
        scores, version = self._asked("POST", body, lambda answer: protocol.read_answer(answer, len(pixels)), self.patience)
        if version != self.description["version"]:
            raise WorkError(
                f"{self.name}: the server was {self.description['version']!r} and is now {version!r}, so its scores may mean something else. "
                "Start the old one again, or begin anew."
            )
        return scores

    # --- one question, as often as it takes -------------------------------------------------------------------------------
    def _asked(self, method: str, body: bytes | None, read: Callable[[bytes], Answer], patience: float) -> Answer:
        """The answer to one question. Raises RewardError where the question is wrong, WorkError where the server is."""
        started, pause, bad = time.monotonic(), PAUSES[0], 0
        while True:
            try:
                status, reason, answer = self._exchange(method, body)
                if status == 200:
                    return read(answer)
                self._close()
                fault = self._refusal(status, reason, answer)
                bad += status not in _TRY_AGAIN
            except BadMessage as error:
                fault, bad = str(error), bad + 1
            except (OSError, http.client.HTTPException) as error:
                fault = self._broken(error)
            except BaseException:  # Ctrl-C: the answer may be half read
                self._close()
                raise
            self._close()
            if bad >= BAD_ANSWERS or time.monotonic() - started + pause > patience:
                raise WorkError(f"{self.name}: {fault} (asked again for {time.monotonic() - started:.0f} s).")
            if pause > 1 >= pause / 2:  # once, where it takes longer than a moment
                logging.getLogger(__name__).warning("warning: %s: %s; asking again for up to %.0f s.", self.name, fault, patience)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def _exchange(self, method: str, body: bytes | None) -> tuple[int, str, bytes]:
        """(status, reason, the whole answer). Raises OSError, HTTPException, BadMessage."""
        until = time.monotonic() + self.timeout
        if self.connection is None:
            self.connection = _connection(self.address, self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "tdpo"}
        self.connection.request(method, self.address.path, body, headers)
        response = self.connection.getresponse()
        length = response.length  # what the header announced
        content = bytearray()
        while part := response.read1(1 << 16):
            content += part
            if len(content) > MAX_ANSWER:
                raise BadMessage(f"the answer is longer than {MAX_ANSWER:,} bytes")
            if time.monotonic() > until:  # a socket's own timeout starts again with every byte
                raise TimeoutError
        if length is not None and len(content) < length:
            raise http.client.IncompleteRead(bytes(content), length - len(content))
        response.close()  # read to its end: the connection is free for the next question
        if response.will_close:
            self._close()
        return response.status, response.reason, bytes(content)

    def _refusal(self, status: int, reason: str, answer: bytes) -> str:
        """What a status other than 200 means. Raises RewardError where asking again cannot help."""
        words = _words(answer) or reason
        if 300 <= status < 400:
            raise RewardError(f"{self.name}: the server sends on to another address ({status}), which is not followed; name that address instead.")
        if 400 <= status < 500 and status not in _TRY_AGAIN:
            raise RewardError(f"{self.name}: the server refused ({status}): {words}")
        return f"the server failed ({status}): {words}"

    def _broken(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} s ({TIMEOUT[0]} changes that)"
        return f"no answer: {first_line(error)}"

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _connection(address: Address, timeout: float) -> http.client.HTTPConnection:
    """Not open yet. Certificates are checked; no proxy is used, whatever the environment says."""
    kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
    return kind(address.host, address.port, timeout=timeout)


def _words(answer: bytes) -> str:
    """What a wrong answer says, on one line without control characters."""
    try:
        said = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in str(said)[:300])


def _seconds(variable: str, otherwise: float) -> float:
    """A positive number from the environment. Raises RewardError."""
    text = os.environ.get(variable)
    try:
        value = otherwise if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise RewardError(f"{variable}={text}: expected a number of seconds.")
    return value
