"""One scorer behind HTTP, by the protocol of docs/rewards.md. Standard library only: it runs where tdpo is not installed.

Pictures are raw uint8, so the scorer gets every pixel as the client has it; scores are float32, which JSON's numbers hold exactly.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

PROTOCOL = "tdpo-reward/1"
MAX_BODY = 256 << 20
Score = Callable[[bytes, int, int, str], float]  # (RGB pixels, width, height, prompt) -> score


def server(score: Score, path: str, version: str, needs_prompt: bool = True) -> HTTPServer:
    """Bound to a free port of this machine; `serve_forever` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, needs_prompt=needs_prompt, encodings=["raw"], scale="the package's own")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > MAX_BODY:
                self.close_connection = True  # the body is not read
                return self.answer(413, error=f"expected a Content-Length of at most {MAX_BODY} bytes")
            body = self.rfile.read(int(length))
            try:
                pictures, prompts = read_question(body)
            except (ValueError, KeyError, TypeError) as error:
                return self.answer(400, error=f"not a question: {type(error).__name__}: {error}")
            try:
                scores = [float(score(*picture, prompt)) for picture, prompt in zip(pictures, prompts)]  # noqa: B905 - equally long
            except Exception as error:  # the package may raise anything
                return self.answer(500, error=f"{type(error).__name__}: {error}")
            self.answer(200, scores=scores)

        def answer(self, status: int, **content: Any) -> None:
            if self.path != path:
                status, content = 404, {"error": f"no reward here, but at {path}"}
            body = json.dumps({"protocol": PROTOCOL, "version": version, **content}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """No line per request."""

    return HTTPServer(("127.0.0.1", 0), Handler)


def read_question(body: bytes) -> tuple[list[tuple[bytes, int, int]], list[str]]:
    """-> (pixels, width, height) of each picture, and its prompt. Raises ValueError, KeyError, TypeError."""
    content = json.loads(body)
    prompts, pictures = content["prompts"], content["images"]
    count, height, width, colours = pictures["shape"]
    data = base64.b64decode(pictures["data"], validate=True)
    size = height * width * colours
    if content["protocol"] != PROTOCOL or pictures["encoding"] != "raw" or colours != 3:
        raise ValueError(f"expected {PROTOCOL} with raw pictures in three colours")
    if len(prompts) != count or len(data) != count * size or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the numbers of pictures, prompts and bytes do not fit each other")
    return [(data[i * size : (i + 1) * size], width, height) for i in range(count)], prompts
