"""Find the images of a folder. Without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdpo_cli.errors import RequestError
from tdpo_cli.storage import outside

COMMON = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}
ALLOW = "Copy them into the folder, or give --follow-links if you trust them"


@dataclass(frozen=True)
class Found:
    """The images of a folder, and what was left out."""

    names: list[str]  # relative to the folder, in name order
    notes: list[str] = field(default_factory=list)


def find(folder: Path, follow_links: bool = False) -> Found:
    """Every image below `folder`, known by its suffix. Hidden files are left out.

    Raises RequestError, also where an image is a link that leads out of the folder, unless `follow_links`.
    """
    check_folder(folder)
    known, other = outside.suffixes(), outside.other_suffixes()
    names, closed, linked, foreign = [], [], [], []
    for place, folders, files in os.walk(folder, onerror=closed.append):
        here = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += [(here / name).as_posix() for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (name for name in files if not name.startswith(".")):
            suffix = Path(name).suffix.lower()
            if suffix in known:
                names.append((here / name).as_posix())
            elif suffix in other:
                foreign.append((here / name).as_posix())
    if not names:
        raise RequestError(f"{folder}: no images in it (looked for {', '.join(sorted(known & COMMON))} and others, also in its folders).")
    check_names(folder, names, follow_links)
    notes = [f"{error.filename}: left out, it cannot be read: {error.strerror}." for error in closed]
    for what, left_out in (("linked folders", linked), ("files of other formats", foreign)):
        if left_out:
            notes.append(f"{len(left_out)} {what} are left out: {listed(sorted(left_out))}.")
    return Found(sorted(names), notes)


def check_names(folder: Path, names: Sequence[str], follow_links: bool) -> None:
    """RequestError for names that are not UTF-8 and, unless `follow_links`, for those that leave the folder."""
    unwritable = [name for name in names if not outside.is_text(name) or "\0" in name]
    if unwritable:
        raise RequestError(f"{folder}: {len(unwritable)} names are not UTF-8 text: {listed([repr(name) for name in unwritable])}. Rename them.")
    if not follow_links:
        inside = Inside(folder)
        leaving = [name for name in names if inside.leaves(name)]
        if leaving:
            raise RequestError(f"{folder}: {len(leaving)} images lie outside it, by their names or by links: {listed(leaving)}. {ALLOW}.")


class Inside:
    """Tells which names of a folder lead out of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = os.path.realpath(folder)
        self.parents: dict[str, bool] = {}  # folder of a name -> whether it leaves

    def leaves(self, name: str) -> bool:
        parent = os.path.dirname(name)
        if parent not in self.parents:
            self.parents[parent] = self._is_out(parent)
        return self.parents[parent] or os.path.islink(self.folder / name) and self._is_out(name)

    def _is_out(self, name: str) -> bool:
        place = os.path.realpath(self.folder / name)
        return place != self.root and not place.startswith(os.path.join(self.root, ""))


def check_folder(folder: Path) -> None:
    """Raises RequestError."""
    if not outside.is_text(str(folder)):
        raise RequestError(f"{str(folder)!r}: not UTF-8 text. Rename the folder.")
    try:
        found = os.stat(folder) and os.path.isdir(folder)
    except FileNotFoundError:
        raise RequestError(f"{folder}: no such folder.") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not found:
        raise RequestError(f"{folder}: not a folder; give the folder that holds the images.")


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
