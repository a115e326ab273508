"""Find the images of a folder. Without torch."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from tdpo_cli.errors import RequestError

# formats that Pillow recognises but does not decode by itself, and EPS, for which it would run another program
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}


def find(folder: Path) -> list[str]:
    """Every image below `folder`, known by its suffix, as a path relative to it, in name order. Hidden files are left out.

    Raises RequestError.
    """
    check_folder(folder)
    suffixes = known_suffixes()
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place).relative_to(folder)
        names += [(here / name).as_posix() for name in files if not name.startswith(".") and Path(name).suffix.lower() in suffixes]
    if not names:
        raise RequestError(f"{folder}: no images in it (looked for {', '.join(sorted(suffixes & COMMON))} and others, also in its folders).")
    return sorted(names)


def check_folder(folder: Path) -> None:
    if not folder.exists():
        raise RequestError(f"{folder}: no such folder.")
    if not folder.is_dir():
        raise RequestError(f"{folder}: not a folder; give the folder that holds the images.")


def known_suffixes() -> set[str]:
    """.png, .jpg, ...: what this Pillow can open."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NOT_IMAGES}
