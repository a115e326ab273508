"""Rewards over HTTP: the address, the question and the answer, as both ends read and write them. Without torch.

docs/rewards.md has the protocol with an example.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tdpo_cli.errors import RewardError, holds_password, without_secrets

if TYPE_CHECKING:
    import numpy as np

PROTOCOL = "tdpo-reward/1"
ENCODINGS = ("raw", "png")
MAX_BODY = 64 << 20  # bytes of a question that a server reads, unless it is told otherwise
_HOST = re.compile(r"[A-Za-z0-9._:-]+")  # names, IPv4, and IPv6 without its brackets
_PATH = re.compile(r"(/[A-Za-z0-9._~@+-]+)+")  # nothing that needs quoting, and no comma, which separates rewards


class BadMessage(ValueError):
    """A question or an answer that is not as the protocol has it."""


# --- where --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Address:
    """http://host:port/path, taken apart."""

    url: str
    secure: bool
    host: str
    port: int
    path: str


def is_address(name: str) -> bool:
    """Whether the name of a reward means a server."""
    return name.lower().startswith(("http://", "https://"))


def address(name: str) -> Address:
    """The parts of an address. Raises RewardError."""
    expected = "expected http://HOST:PORT/PATH or https://HOST/PATH, as in http://127.0.0.1:8765/aesthetic"
    try:
        parts = urlsplit(name)
        port = parts.port
        hides = parts.username is not None or parts.password is not None
    except ValueError:  # its words may hold a part of the password
        hides, parts = holds_password(name), None
    if hides:
        raise RewardError(f"a reward's address holds no user or password, as it is written into files: {expected}")
    if parts is None or not _HOST.fullmatch(parts.hostname or "") or not _PATH.fullmatch(parts.path) or parts.query or parts.fragment:
        raise RewardError(f"reward {without_secrets(name)!r} is not the address of a reward server: {expected}")
    secure = parts.scheme.lower() == "https"
    return Address(name, secure, parts.hostname, port or (443 if secure else 80), parts.path)


# --- the question -------------------------------------------------------------------------------------------------------
def question(images: np.ndarray, prompts: Sequence[str], encoding: str) -> bytes:
    """images [b,H,W,3] uint8 with one prompt each -> the body of a POST."""
    if encoding == "raw":
        pictures: dict[str, Any] = {"encoding": "raw", "shape": list(images.shape), "data": _text(images.tobytes())}
    else:
        pictures = {"encoding": "png", "data": [_text(_png(pixels)) for pixels in images]}
    return json.dumps({"protocol": PROTOCOL, "prompts": list(prompts), "images": pictures}).encode()


def read_question(body: bytes, max_bytes: int) -> tuple[np.ndarray, list[str]]:
    """The body of a POST -> images [b,H,W,3] uint8 of at most `max_bytes`, one prompt each. Raises BadMessage."""
    content = _object(body)
    prompts, pictures = content.get("prompts"), content.get("images")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadMessage("prompts: expected a list of texts, at least one")
    if not isinstance(pictures, dict) or pictures.get("encoding") not in ENCODINGS:
        raise BadMessage(f"images: expected an object with encoding {' or '.join(ENCODINGS)}")
    images = _read_raw(pictures, max_bytes) if pictures["encoding"] == "raw" else _read_png(pictures, max_bytes)
    if len(images) != len(prompts):
        raise BadMessage(f"{len(images)} images but {len(prompts)} prompts")
    return images, prompts


def _read_raw(pictures: dict[str, Any], max_bytes: int) -> np.ndarray:
    import numpy as np

    shape = pictures.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(side) is int and side > 0 for side in shape) or shape[3] != 3:
        raise BadMessage("images.shape: expected [images, height, width, 3]")
    data = _bytes(pictures.get("data"))
    if len(data) != math.prod(shape) or len(data) > max_bytes:
        raise BadMessage(f"images.data: {len(data):,} bytes, the shape needs {math.prod(shape):,}, allowed are {max_bytes:,}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_png(pictures: dict[str, Any], max_bytes: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    encoded = pictures.get("data")
    if not isinstance(encoded, list) or not encoded:
        raise BadMessage("images.data: expected a list of PNG files, each in base64")
    arrays: list[np.ndarray] = []
    for data in encoded:
        try:
            with Image.open(io.BytesIO(_bytes(data)), formats=["PNG"]) as image:
                if arrays and image.size != arrays[0].shape[1::-1]:
                    raise BadMessage("images of one request must have one size")
                if math.prod(image.size) * 3 * len(encoded) > max_bytes:  # known before a pixel is unpacked
                    raise BadMessage(f"images.data: unpacked more than the {max_bytes:,} bytes allowed")
                arrays.append(np.asarray(image.convert("RGB")))
        except BadMessage:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise BadMessage(f"images.data: image {len(arrays)} is not a readable PNG file ({type(error).__name__})") from None
    return np.stack(arrays)


# --- the answer ---------------------------------------------------------------------------------------------------------
def answer(scores: Sequence[float], version: str) -> dict[str, Any]:
    """One number per image, null where there is none."""
    return {"protocol": PROTOCOL, "version": version, "scores": [score if math.isfinite(score) else None for score in scores]}


def read_answer(body: bytes, count: int) -> tuple[list[float], str]:
    """-> (scores of `count` images, NaN where the server gave null; the server's version). Raises BadMessage."""
    content = _object(body)
    scores = content.get("scores")
    if not isinstance(scores, list):
        raise BadMessage("the answer has no list called scores")
    if len(scores) != count:
        raise BadMessage(f"the answer has {len(scores)} scores for {count} images")
    for score in scores:
        if score is not None and (type(score) not in (int, float) or not abs(score) <= 3e38):  # float32's range; a NaN is not JSON
            raise BadMessage(f"the answer has a score that is neither null nor a number of float32's range: {str(score)[:60]}")
    return [math.nan if score is None else float(score) for score in scores], _version(content)


def read_description(body: bytes) -> dict[str, Any]:
    """The answer to GET: version, needs_prompt, encodings and what else the server says. Raises BadMessage."""
    content = _object(body)
    encodings = content.get("encodings", list(ENCODINGS[:1]))
    if not isinstance(encodings, list) or not set(ENCODINGS) & {one for one in encodings if isinstance(one, str)}:
        raise BadMessage(f"encodings: expected some of {', '.join(ENCODINGS)}")
    if not isinstance(content.get("needs_prompt", True), bool):
        raise BadMessage("needs_prompt: expected true or false")
    texts = {key: str(content[key])[:200] for key in ("reward", "scale", "variant") if content.get(key) is not None}
    return {
        **texts, "version": _version(content), "needs_prompt": content.get("needs_prompt", True),
        "encoding": next(one for one in encodings if one in ENCODINGS),
    }  # fmt: skip


# --- parts --------------------------------------------------------------------------------------------------------------
def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadMessage("this is not JSON") from None
    if not isinstance(content, dict):
        raise BadMessage("this is not a JSON object")
    if content.get("protocol") != PROTOCOL:
        raise BadMessage(f"protocol is {str(content.get('protocol'))[:60]!r}, expected {PROTOCOL!r}")
    return content


def _version(content: dict[str, Any]) -> str:
    version = content.get("version")
    if not isinstance(version, str) or not 0 < len(version) <= 200 or not version.isprintable():
        raise BadMessage("version: expected a text of 1 to 200 printable characters")
    return version


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BadMessage("images.data: expected base64") from None


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
