"""Files and folders that are whole or not there, folders that one process owns, a failing disk as one clear message.

A folder may come from a stranger: nothing is written through a link in it, and only regular files are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tdpo_cli.errors import RequestError, WorkError, first_line

NOT_FOLLOWED = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # not blocking: a pipe without a writer


def _mode() -> int:
    """The permissions that a new file gets."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


MODE = _mode()  # once: to read the mask is to set it, for all threads


# --- before anything is written -------------------------------------------------------------------------------------------
def make(folder: Path) -> None:
    """The folder, with its parents. Raises RequestError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: cannot be written: permission denied")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """RequestError where one of the names in a folder is a link: what is written there would go elsewhere."""
    for name in names:
        if (folder / name).is_symlink():
            raise RequestError(
                f"{folder / name}: a link to {os.readlink(folder / name)}. Nothing is written through a link inside a folder that may come from "
                "elsewhere: replace it by what it points to."
            )


def lock(folder: Path, doing: str) -> IO:
    """Make the folder this process's own while the file returned is open: the kernel lets go when its owner dies.

    doing: what a second process is told that the first is doing there. Raises RequestError.
    """

    def opened() -> IO:
        make(folder)
        refuse_links(folder, [".lock"])
        try:
            return os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, MODE), "rb", buffering=0)
        except OSError as error:
            raise RequestError(f"{folder}: cannot be written: {error.strerror}") from None

    still_it = lambda file: is_locked_by(folder, file)
    return locked(opened, still_it, folder / ".lock", folder, f"{folder}: another tdpo process is {doing} in this folder.")


def locked(opened: Callable[[], IO], still_it: Callable[[IO], bool], path: Path, place: Path, busy: str) -> IO:
    """Open and lock a file, again where it was removed in between. -> the file; the kernel lets go when it is closed.

    path: of the file. place: what a message names. busy: the message where another process has it. Raises RequestError.
    """
    while True:
        file = opened()
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(f"{path}: not a regular file.")
            _flock(file, place, busy)
            if still_it(file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # removed between the two calls


def _flock(file: IO, place: Path, busy: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(busy) from None
    except OSError as error:
        raise RequestError(f"{place}: this file system cannot lock ({error.strerror}); choose another place.") from None


def is_open_as(file: IO, path: Path, follow_symlinks: bool = True) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=follow_symlinks))
    except OSError:
        return False


def watch(folder: Path, within: float = 40.0) -> IO | None:
    """The lock of another process's folder, to compare with `still_there`; None where it is gone already.

    within: seconds that a network disk may take to show what another machine has just made; NFS takes up to 30.
    """
    until = time.monotonic() + within
    while True:
        try:
            return os.fdopen(os.open(folder / ".lock", os.O_RDONLY | NOT_FOLLOWED), "rb", buffering=0)
        except OSError:
            if time.monotonic() > until:
                return None
        time.sleep(0.2)


def is_locked_by(folder: Path, lock: IO) -> bool:
    """Whether the folder is still the one that was locked."""
    return is_open_as(lock, folder / ".lock", follow_symlinks=False)


def still_there(folder: Path, lock: IO | None) -> None:
    """WorkError where the folder that was locked, or watched, was removed, moved or replaced."""
    if lock is None or not is_locked_by(folder, lock):
        raise WorkError(
            f"{folder}: the folder was removed, moved or replaced while tdpo wrote into it. Nothing more is written there; "
            "the same command starts anew."
        )


# --- writing --------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole(path: Path, shared: bool = False, inside: Path | None = None) -> Iterator[Path]:
    """A path beside `path` to write a file to, which becomes `path` at the end, or nothing does. Raises WorkError.

    shared: other processes may write that file at the same time. inside: a folder that is not made anew if it is gone.
    Raises RequestError where `path` is a device, a pipe or a folder.
    """
    if path.exists() and not path.is_file():
        raise RequestError(f"{path}: not a regular file, so it is not replaced. Choose another place.")
    aside = aside_of(path, f".{os.getpid()}" if shared else "")
    with failures(path), nothing_left(aside):
        make_below(inside, path.parent)
        remove(aside)  # what was left, or put there: a link would be followed
        yield aside
        aside.chmod(MODE)  # safetensors' own files are for their owner only
        sync(aside)
        aside.rename(path)
        sync(path.parent)


def make_below(top: Path | None, folder: Path) -> None:
    """The folder with its parents, but not `top`: who removes a folder that is written to must not get half of it back. Raises OSError."""
    if top is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    place = top
    for name in folder.relative_to(top).parts:
        place /= name
        place.mkdir(exist_ok=True)


def write_text(path: Path, text: str, shared: bool = False, inside: Path | None = None) -> None:
    write_bytes(path, text.encode("utf-8"), shared, inside)


def write_bytes(path: Path, content: bytes, shared: bool = False, inside: Path | None = None) -> None:
    with whole(path, shared, inside) as aside:
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
            remove(aside)
        raise


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- reading what may be damaged, or a stranger's -----------------------------------------------------------------------------
def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises FileNotFoundError, and RequestError for what cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(f"{path}: not a regular file.")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path, kind: type, advice: str = "") -> Any:
    """The JSON of a file, which is of that kind (dict, list). Raises FileNotFoundError, and RequestError for what is damaged."""
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers and nesting beyond all limits; not RequestError's
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: damaged: {first_line(error)}.{advice}") from None
    if not isinstance(content, kind):
        raise RequestError(f"{path}: damaged: expected a {kind.__name__}, found a {type(content).__name__}.{advice}")
    return content


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
