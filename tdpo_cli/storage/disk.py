"""Files and folders that are whole or not there, folders that one process owns, a failing disk as one clear message."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tdpo_cli.errors import RequestError, WorkError, first_line


# --- before anything is written -------------------------------------------------------------------------------------------
def make(folder: Path) -> None:
    """The folder, with its parents. Raises RequestError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: cannot be written: permission denied")


def lock(folder: Path, doing: str) -> IO:
    """Make the folder this process's own while the file returned is open: the kernel lets go when its owner dies.

    doing: what a second process is told that the first is doing there. Raises RequestError.
    """
    make(folder)
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        taken = isinstance(error, BlockingIOError)
        reason = (
            f"another tdpo process is {doing} in this folder" if taken else f"this file system cannot lock ({error.strerror}); choose another place"
        )
        raise RequestError(f"{folder}: {reason}.") from None
    return file


# --- writing --------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file to, which becomes `path` at the end, or nothing does. Raises WorkError.

    shared: other processes may write that file at the same time.
    """
    aside = aside_of(path, f".{os.getpid()}" if shared else "")
    with failures(path), nothing_left(aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        sync(aside)
        aside.rename(path)
        sync(path.parent)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    write_bytes(path, text.encode("utf-8"), shared)


def write_bytes(path: Path, content: bytes, shared: bool = False) -> None:
    with whole(path, shared) as aside:
        aside.write_bytes(content)


def aside_of(path: Path, mark: str = "") -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(f".{path.name}{mark}.tmp")


@contextlib.contextmanager
def nothing_left(aside: Path) -> Iterator[None]:
    """Whatever goes wrong, no half-written file or folder stays."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until that file, or the list of names in that folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def failures(where: Path) -> Iterator[None]:
    """A full or failing disk as one clear message: WorkError."""
    try:
        yield
    except WorkError:
        raise
    except Exception as error:
        # torch and safetensors do not hand on the system's error: a full disk is a RuntimeError about positions
        name = type(error).__name__
        if name == "OutOfMemoryError" or not (isinstance(error, (OSError, RuntimeError)) or name == "SafetensorError"):
            raise
        reason = getattr(error, "strerror", None) or f"{first_line(error)} (is the disk full? {_free(where)} free)"
        raise WorkError(f"{where}: writing failed: {reason}. What was saved before is intact.") from error


def _free(where: Path) -> str:
    place = next((place for place in (where, *where.absolute().parents) if place.exists()), where)
    try:
        return f"{shutil.disk_usage(place).free / 1e6:.0f} MB"
    except OSError:
        return "unknown"
