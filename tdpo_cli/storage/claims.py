"""Files and folders that one process takes for itself: locks, and new names that no two processes get."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tdpo_cli.errors import RequestError
from tdpo_cli.storage import disk


def own_file(path: Path, doing: str, new: bool = False) -> IO[bytes]:
    """Make a regular file this process's own while what is returned is open; it is created where it is missing.

    doing: what a second process is told that the first is doing. `new`: FileExistsError where the file exists. Raises RequestError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_EXCL if new else 0)

    def opened() -> IO[bytes]:
        try:
            return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        except FileExistsError:
            raise
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror}.") from None

    busy = f"{path}: another tdpo process is {doing} this file. Wait for it, or choose another --out."
    return disk.locked(opened, lambda file: disk.is_open_as(file, path), path, path, busy)


def new_file(base: Path, name: str, suffix: str, doing: str) -> tuple[Path, IO[bytes]]:
    """`base/name-0001.suffix`, counting up to the first name that is free, taken as `own_file` does. Raises RequestError."""
    number = 1
    while True:
        path = base / f"{name}-{number:04d}{suffix}"
        with contextlib.suppress(FileExistsError):
            return path, own_file(path, doing, new=True)
        number += 1


@contextlib.contextmanager
def new_folder(base: Path, name: str) -> Iterator[Path]:
    """`base/name-0001`, counting up to the first that can be made; removed if an error leaves it empty. Raises RequestError."""
    with made(base):
        number = 1
        while True:
            folder = base / f"{name}-{number:04d}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise RequestError(f"{folder}: cannot be written: {error.strerror}.") from None
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # refused by the system unless it is empty
            raise


@contextlib.contextmanager
def given_or_new(given: Path | None, base: Path, name: str, take: bool = True) -> Iterator[Path]:
    """The folder that was asked for, else one of `new_folder`; without `take` only its name, as for all workers but the main one."""
    if given is not None:
        yield given
    elif take:
        with new_folder(base, name) as folder:
            yield folder
    else:
        yield next(place for number in itertools.count(1) if not (place := base / f"{name}-{number:04d}").exists())


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder with its parents; those made here are removed again if an error leaves them empty. Raises RequestError."""
    made_here = []
    try:
        for place in (*reversed(folder.parents), folder):
            try:
                place.mkdir()
                made_here.append(place)
            except FileExistsError:
                pass
            except OSError as error:
                if not place.is_dir():
                    raise RequestError(f"{folder}: cannot be written: {error.strerror}.") from None
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise RequestError(f"{folder}: cannot be written: {'permission denied' if folder.is_dir() else 'not a folder'}.")
        yield
    except BaseException:
        for place in reversed(made_here):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
