"""Images for a page: read, made smaller where they would be too much, embedded as data URIs."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.report.numbers import spread

BUDGET = 5_800_000  # bytes of images on a page; base64 makes 7.7 MB of them
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """One encoded image."""

    content: bytes
    width: int  # px
    height: int  # px
    kind: str = "image/png"

    @property
    def uri(self) -> str:
        return f"data:{self.kind};base64,{base64.b64encode(self.content).decode()}"


def read(file: Path) -> Picture | None:
    """A PNG as it lies on disk; None if it is not there or not whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    # signature, length and type of the first chunk, width, height; IEND is the last chunk of a whole file
    if len(content) < 33 or not content.startswith(PNG_START) or b"IEND" not in content[-12:]:
        return None
    return Picture(content, *struct.unpack(">II", content[16:24]))


def as_jpeg(picture: Picture, widest: int) -> Picture:
    """At most `widest` px wide, much smaller on disk; the picture itself where it cannot be decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture.content)) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return picture
    if image.width > widest:
        image = image.resize((widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return Picture(out.getvalue(), *image.size, "image/jpeg")


@dataclass(frozen=True)
class Frames:
    """Images of a sequence that fit on a page: their places in it, and what was done to make them fit."""

    places: Sequence[int]
    pictures: Sequence[Picture]
    left_out: str  # a sentence, or nothing


def fit(files: Sequence[Path], budget: int = BUDGET, widest: int = 1200) -> Frames:
    """As many of the files as fit, evenly spaced, the first and the last among them; as JPEG where PNGs are too large."""
    sizes = {i: size for i, file in enumerate(files) if (size := _size(file))}
    if sum(sizes.values()) <= budget:
        return _frames(files, list(sizes), None)
    sample = read(files[max(sizes, key=sizes.__getitem__)])
    each = len(as_jpeg(sample, widest).content) if sample else max(sizes.values())
    return _frames(files, spread(list(sizes), max(2, int(budget / (1.1 * each)))), widest)


def _frames(files: Sequence[Path], places: Sequence[int], widest: int | None) -> Frames:
    found = {}
    for i in places:  # one by one: the originals together may be hundreds of megabytes
        if picture := read(files[i]):
            found[i] = picture if widest is None else as_jpeg(picture, widest)
    thinned = f"{len(places)} of {len(files)} images, evenly spaced" if len(places) < len(files) else "the images"
    smaller = f", as JPEG of at most {widest} px" if widest is not None else ""
    said = f"To keep this file small it holds {thinned}{smaller}." if smaller or len(places) < len(files) else ""
    broken = len(places) - len(found)
    return Frames(list(found), list(found.values()), f"{said} {f'{broken} could not be read.' if broken else ''}".strip())


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
