"""Read an image of an allowed format as 8-bit RGB, ahead of use and in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tdpo_cli.score import ahead
from tdpo_cli.storage import outside

LARGEST = 2**26  # pixels of one image; decoding takes about 11 bytes each, scoring 12 and more
AHEAD = 2**26  # pixels that are decoded and not used yet
BACKGROUND = "white"  # what shows through transparent pixels


class UnreadableImage(Exception):
    """Not an image, damaged, or too large; the message is the reason."""


def read(path: Path) -> Tensor:
    """[3,H,W] uint8: upright as EXIF says, transparent parts over white, the first frame of an animation.

    Raises UnreadableImage.
    """
    try:
        with warnings.catch_warnings(), outside.open_regular(path) as file, outside.open_image(file) as image:
            warnings.simplefilter("ignore")  # large but allowed; odd EXIF
            if image.width * image.height > LARGEST:
                raise UnreadableImage(f"too large: {image.width} x {image.height}, more than {LARGEST:,} pixels")
            pixels = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
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
    if 0 in pixels.shape:
        raise UnreadableImage("it has no pixels")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB. 16 bits a channel are rounded to 8, not cut off; alpha is composited over white."""
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
    return image.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.nan_to_num(levels).round().clip(0, 255).astype(np.uint8))


def read_ahead(paths: Sequence[Path], threads: int) -> Iterator[Tensor | UnreadableImage]:
    """Every path's pixels, or what is wrong with it, in order. Decoded by threads, ahead of use by two images each and AHEAD pixels together."""
    return ahead.in_order(_read_or_error, paths, threads, _pixels, AHEAD)


def _pixels(path: Path) -> int:
    """Of an image, by its header; 0 where it will not be decoded."""
    try:
        with warnings.catch_warnings(), outside.open_regular(path) as file, outside.open_image(file) as image:
            return image.width * image.height if image.width * image.height <= LARGEST else 0
    except Exception:  # noqa: BLE001 - `read` says what is wrong
        return 0


def _read_or_error(path: Path) -> Tensor | UnreadableImage:
    try:
        return read(path)
    except UnreadableImage as error:
        return error
