"""Read an image of an allowed format as 8-bit RGB, ahead of use and in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tdpo_cli.rewards import preprocess
from tdpo_cli.rewards.preprocess import Square
from tdpo_cli.score import ahead
from tdpo_cli.storage import outside

LARGEST = 2**26  # pixels of one image; decoding takes about 11 bytes each, scoring 12 and more
AHEAD = 2**26  # pixels that are decoded and not used yet
BACKGROUND = "white"  # what shows through transparent pixels
Result = TypeVar("Result")


class UnreadableImage(Exception):
    """Not an image, damaged, or too large; the message is the reason."""


def read(path: Path) -> Tensor:
    """All pixels, [3,H,W] uint8. Raises UnreadableImage."""
    return _read(path, lambda picture: torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))


def read_squares(path: Path, squares: Sequence[Square]) -> tuple[Tensor, ...]:
    """[3,size,size] uint8 for each of the squares. Raises UnreadableImage."""
    return _read(path, lambda picture: tuple(preprocess.square_of(picture, square) for square in squares))


def _read(path: Path, use: Callable[[Image.Image], Result]) -> Result:
    """use(RGB picture): upright as EXIF says, transparent parts over white, the first frame of an animation. Raises UnreadableImage."""
    try:
        with warnings.catch_warnings(), outside.open_regular(path) as file, outside.open_image(file) as image:
            warnings.simplefilter("ignore")  # large but allowed; odd EXIF
            if image.width * image.height > LARGEST:
                raise UnreadableImage(f"too large: {image.width} x {image.height}, more than {LARGEST:,} pixels")
            ImageOps.exif_transpose(image, in_place=True)  # no copy of the many that are upright
            picture = to_rgb(image)
            if 0 in picture.size:
                raise UnreadableImage("it has no pixels")
            return use(picture)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"a decompression bomb: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"no image of a format that is read ({', '.join(outside.formats())})") from None
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except Exception as error:  # noqa: BLE001 - each of Pillow's decoders raises its own on damaged data
        raise UnreadableImage(getattr(error, "strerror", None) or str(error).strip() or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, which stays the same object. 16 bits a channel are rounded to 8, not cut off; alpha is composited over white."""
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey; in 32-bit files too the values are 16-bit ones
        image = _grey(np.asarray(image).astype(np.float64) / 257)
    elif image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        image = _grey(values * 255 if values.size and np.nanmax(values) <= 1 else values)  # 0..1 or 0..255
    elif image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        page = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(page, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.nan_to_num(levels).round().clip(0, 255).astype(np.uint8))


def read_ahead(paths: Sequence[Path], threads: int, squares: Sequence[Square] = ()) -> Iterator[tuple[Tensor, ...] | UnreadableImage]:
    """Every path's squares, or without any its pixels alone, or what is wrong with it; in order.

    Decoded and resized by threads, ahead of use by two images each and AHEAD pixels together.
    """
    return ahead.in_order(lambda path: _read_or_error(path, squares), paths, threads, _pixels, AHEAD)


def _pixels(path: Path) -> int:
    """Of an image, by its header; 0 where it will not be decoded."""
    try:
        with warnings.catch_warnings(), outside.open_regular(path) as file, outside.open_image(file) as image:
            return image.width * image.height if image.width * image.height <= LARGEST else 0
    except Exception:  # noqa: BLE001 - `read` says what is wrong
        return 0


def _read_or_error(path: Path, squares: Sequence[Square]) -> tuple[Tensor, ...] | UnreadableImage:
    try:
        return read_squares(path, squares) if squares else (read(path),)
    except UnreadableImage as error:
        return error
