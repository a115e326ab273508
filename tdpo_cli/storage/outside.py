"""Read files that a stranger made: tables of text, and images. Only regular files, and what is returned is checked.

Every image file and every file of prompts is opened here, nowhere else.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tdpo_cli.errors import RequestError, first_line

if TYPE_CHECKING:
    from PIL import Image

# Formats that hold pictures and that Pillow decodes by itself: for some others it would run another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
LARGEST_CELL = 2**31 - 1  # characters; csv's own limit of 131,072 is below a large workflow's

csv.field_size_limit(LARGEST_CELL)  # for the whole process: csv knows no other


class NotRegular(OSError):
    """A folder, device, pipe or socket."""


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, for reading; a pipe is refused and not waited for. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise OSError(str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular("not a regular file")
    return os.fdopen(descriptor, "rb")


def open_image(file: IO[bytes]) -> Image.Image:
    """One of FORMATS by its content, its pixels not decoded yet. Raises what Pillow's parsers raise."""
    from PIL import Image

    return Image.open(file, formats=formats())


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def suffixes() -> set[str]:
    """.png, .jpg, ...: the names that images of FORMATS have."""
    from PIL import Image

    known = formats()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}


def other_suffixes() -> set[str]:
    """Of image formats that are left out."""
    from PIL import Image

    return set(Image.registered_extensions()) - suffixes()


# --- text ---------------------------------------------------------------------------------------------------------------
def read_text(path: Path, most: int | None = None) -> str:
    """The UTF-8 text of a file, of at most so many bytes. Raises FileNotFoundError, and RequestError for what cannot be read."""
    try:
        with open_regular(path) as file:
            content = file.read() if most is None else file.read(most + 1)
        if most is not None and len(content) > most:
            raise RequestError(f"{path}: more than {most:,} bytes, too long for a prompt.")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def rows(path: Path, text: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    """(line, row) of the text of a .jsonl or .csv. Raises RequestError."""
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _json_row(path, number, line)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from None


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also nesting and numbers beyond all limits
        raise RequestError(f"{path}, line {number}: not valid JSON: {first_line(error)}.") from None
    if not isinstance(row, dict):
        raise RequestError(f"{path}, line {number}: expected an object with `file_name` and `prompt`.")
    return row


def is_text(value: Any) -> bool:
    """Whether this is a string that a file can hold: no half characters, which stand for bytes that are not UTF-8."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
