"""Read any of Pillow's formats as 8-bit RGB, ahead of use and in order."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

BACKGROUND = "white"  # what shows through transparent pixels


class UnreadableImage(Exception):
    """Not an image, damaged, or too large; the message is the reason."""


def read(path: Path) -> Tensor:
    """[3,H,W] uint8: upright as EXIF says, transparent parts over white, the first frame of an animation.

    Raises UnreadableImage.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # large but allowed; odd EXIF
            pixels = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError:
        raise UnreadableImage(f"a decompression bomb: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except Exception as error:  # noqa: BLE001 - each of Pillow's decoders raises its own on damaged data
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it").strip()
        raise UnreadableImage(reason or type(error).__name__) from None
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
    """Every path's pixels, or what is wrong with it, in order. Decoded by threads, at most two images each ahead of use."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for path in paths:
                waiting.append(pool.submit(_read_or_error, path))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_or_error(path: Path) -> Tensor | UnreadableImage:
    try:
        return read(path)
    except UnreadableImage as error:
        return error
