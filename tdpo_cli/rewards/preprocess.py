"""Turn images in [0,1] into a network's input, on any device, with the pixels Pillow would have made.

Pillow resizes 8-bit images in fixed point: one pass along the rows, rounded and clamped to whole grey levels, then one
pass down the columns of that result. Scores were published on such pixels, and a single floating-point pass is off by
up to 22 grey levels at hard edges. So the same integers are computed here: coefficients with 22 fractional bits and
int32 sums, which no matmul precision setting (TF32, bf16) can change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CropOffset = Literal["floor", "round"]
Framing = Literal["floor", "round", "letterbox"]  # how any image becomes a square: a central crop, or black bars
Square = tuple[int, CropOffset]  # the central square that a network sees: its side, where the crop begins

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0,1]
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_FRACTION_BITS = 22  # of a coefficient: 32 bits, less 8 for the pixel, less 2 of headroom (Pillow, Resample.c)
_PILLOW_RATIO = 4  # of the sides: Pillow also makes what is cropped off, which for a long strip is gigabytes
_GPU_PLANES = 192  # colour planes per kernel; bounds the int32 copies to 0.4 GB for 512 px images


_resized: dict[tuple, tuple[Tensor, Tensor]] | None = None  # in `resizing_once`: what was asked for -> source, result


@contextmanager
def resizing_once() -> Iterator[None]:
    """Within: several rewards of one uint8 batch share its resized pixels. The batch must not change."""
    global _resized
    _resized = {}
    try:
        yield
    finally:
        _resized = None


def frame(images: Tensor, size: int, framing: Framing = "floor") -> Tensor:
    """images [b,3,H,W] in [0,1] -> [b,3,size,size] float32 on the scale 0..255, by `resize_crop` or `letterbox`."""
    return letterbox(images, size) if framing == "letterbox" else resize_crop(images, size, framing)


@torch.no_grad()
def resize_crop(images: Tensor, size: int, crop_offset: CropOffset = "floor") -> Tensor:
    """Resize the shortest side to `size` (bicubic, antialiased), then cut the central square.

    images [b,3,H,W] float in [0,1], quantised to 8 bits as a saved file would be, or uint8 -> [b,3,size,size] float32, whole
    numbers 0..255. `crop_offset` is where the processors differ: (n - size) // 2 in transformers ("floor"),
    round((n - size) / 2) in torchvision ("round"). Images already of that size are only quantised.

    Equal to `PIL.Image.resize(..., BICUBIC)` of Pillow 10.4 to the last grey level. Newer versions (Pillow pull request
    9549) shrink images more than twice as tall as wide down the columns first, which changes those images by up to 20
    levels; the published scores are older than that, so the pass along the rows always comes first here.
    """
    height, width = images.shape[-2:]
    new_height, new_width = _shortest_to(size, height, width)
    if images.dtype == torch.uint8 and images.device.type == "cpu" and max(new_height, new_width) <= _PILLOW_RATIO * size:
        return _resize_levels(images, size, crop_offset)
    horizontal = _band(width, new_width, _central(new_width, size, crop_offset), size, images.device)
    vertical = _band(height, new_height, _central(new_height, size, crop_offset), size, images.device)

    planes = images.flatten(0, -3)
    resized = torch.empty(len(planes), size, size, device=images.device)
    # A single plane stays in a CPU's cache, three times as fast as a batch; a GPU wants few large kernels.
    for start in range(0, len(planes), chunk := 1 if images.device.type == "cpu" else _GPU_PLANES):
        pixels = quantise(planes[start : start + chunk])
        if vertical:
            pixels = pixels[:, vertical.first : vertical.last]  # the rows that reach the crop
        if horizontal:
            # Transposed as one matrix of all rows: torch copies a 2-D transpose in blocks, three times as fast as 3-D.
            rows = pixels.shape[1]
            across = pixels.flatten(0, 1).t().contiguous()[None, horizontal.first : horizontal.last]
            pixels = _combine_rows(across, horizontal)[0].t().contiguous().view(-1, rows, size)
        if vertical:
            pixels = _combine_rows(pixels, vertical)
        resized[start : start + chunk] = pixels
    return resized.view(*images.shape[:-2], size, size)


def _shortest_to(size: int, height: int, width: int) -> tuple[int, int]:
    longest = int(size * max(height, width) / min(height, width))
    return (longest, size) if height >= width else (size, longest)


def square_of(picture: Image.Image, square: Square) -> Tensor:
    """An RGB picture's central square, as `resize_crop` makes it: [3,size,size] uint8."""
    size, crop_offset = square
    if max(_shortest_to(size, picture.height, picture.width)) <= _PILLOW_RATIO * size:
        levels = np.asarray(_by_pillow(picture, size, crop_offset))
        return torch.from_numpy(levels.copy()).permute(2, 0, 1)
    levels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return resize_crop(levels[None], size, crop_offset)[0].to(torch.uint8)


def _by_pillow(picture: Image.Image, size: int, crop_offset: CropOffset) -> Image.Image:
    width, height = picture.size
    new_height, new_width = _shortest_to(size, height, width)
    left, top = _central(new_width, size, crop_offset), _central(new_height, size, crop_offset)
    # one axis a call: newer versions choose the order of the two passes by the shape
    across = picture.resize((new_width, height), Image.Resampling.BICUBIC)
    return across.resize((new_width, new_height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _resize_levels(images: Tensor, size: int, crop_offset: CropOffset) -> Tensor:
    """`resize_crop` of [b,3,H,W] uint8 on the CPU, by Pillow: from whole levels it is the faster way."""
    key = (images.data_ptr(), images.shape, images.stride(), size, crop_offset)
    if _resized is not None and key in _resized:
        return _resized[key][1]
    resized = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for levels, image in zip(resized, images.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        levels[:] = _by_pillow(Image.fromarray(image), size, crop_offset)
    result = torch.from_numpy(resized).permute(0, 3, 1, 2).float()
    if _resized is not None:
        _resized[key] = images, result  # the source too: while it lives, no other has its address
    return result


def quantise(images: Tensor) -> Tensor:
    """The grey levels a PNG of these images would hold: [0,1] of any float type, or uint8 -> float32, whole numbers 0..255."""
    if images.dtype == torch.uint8:
        return images.contiguous().float()
    return images.float().mul(255).round_().clamp_(0, 255)


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(levels / 255 - mean) / std per channel: levels [b,3,h,w] in 0..255 -> [b,3,h,w] float32."""
    mean_c = torch.tensor(mean, dtype=torch.float32, device=levels.device).view(3, 1, 1)
    std_c = torch.tensor(std, dtype=torch.float32, device=levels.device).view(3, 1, 1)
    return levels.div(255).sub_(mean_c).div_(std_c)


@torch.no_grad()
def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the longest side to `size`, then pad with black to a square, as the hpsv2 package does.

    images [b,3,H,W] float in [0,1], quantised to 8 bits -> [b,3,size,size] float32 on the scale 0..255. Here the
    package resizes a float tensor, so nothing is rounded or clamped: values may leave 0..255 at hard edges.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    levels = quantise(images)
    if (new_height, new_width) != (height, width):
        # antialias is off by default here, and was on in the package
        resize = {"size": (new_height, new_width), "mode": "bicubic", "antialias": True, "align_corners": False}
        levels = F.interpolate(levels.div_(255), **resize).mul_(255)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(levels, (left, size - new_width - left, top, size - new_height - top))


def _central(length: int, size: int, crop_offset: CropOffset) -> int:
    """Where a central crop of `size` begins on a side of `length`."""
    return (length - size) // 2 if crop_offset == "floor" else round((length - size) / 2)


class _Band(NamedTuple):
    """The non-zero band of a resizing matrix: output o is sum_k weights[k,o] * source[first + index[k,o]]."""

    index: Tensor  # [K,n_out] int64
    weights: Tensor  # [K,n_out,1] int32, in units of 2^-22
    first: int  # the source positions in use are first .. last - 1
    last: int


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for later callers, who may be outside inference mode
def _band(n_in: int, n_out: int, start: int, count: int, device: torch.device) -> _Band | None:
    """Pillow's bicubic coefficients (Resample.c, a = -0.5) for the outputs start .. start + count - 1 of n_in -> n_out.

    None where an axis stays as it is. An axis that keeps its length and is only cropped gets whole weights, so copies.
    """
    if n_in == n_out == count:
        return None
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # a shrinking filter widens: this is the antialiasing
    support = 2.0 * stretch
    centre = (np.arange(start, start + count) + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support + 0.5).astype(np.int64), n_in)

    tap = np.arange((high - low).max())[:, None]  # [K,1]
    weights = np.where(tap < high - low, _bicubic((tap + low - centre + 0.5) * (1.0 / stretch)), 0.0)  # [K,count]
    total = np.zeros(count)
    for row in weights:  # one after another, as the C loop adds: a pairwise or compensated sum rounds differently
        total += row
    fixed = weights / total * (1 << _FRACTION_BITS)
    fixed = np.trunc(np.where(fixed < 0, fixed - 0.5, fixed + 0.5)).astype(np.int32)

    first, last = int(low.min()), int(high.max())
    index = np.minimum(tap + low, high - 1) - first  # past the end of the support the weight is 0
    return _Band(torch.from_numpy(index).to(device), torch.from_numpy(fixed)[..., None].to(device), first, last)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5, in the order of operations of Pillow's C code."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _combine_rows(pixels: Tensor, band: _Band) -> Tensor:
    """One of the two passes, down the columns: [n,rows,D] whole numbers 0..255 -> [n,n_out,D] int32 0..255.

    A row gather and a multiply-add per tap: contiguous memory, no dense matrix. The sums stay below 2^31, as in Pillow,
    because the kernel's absolute weights add up to 1.25 at most.
    """
    pixels = pixels.to(torch.int32)
    total = pixels.new_full((len(pixels), band.index.shape[1], pixels.shape[2]), 1 << (_FRACTION_BITS - 1))  # to round
    gathered = torch.empty_like(total)
    for index, weights in zip(band.index, band.weights, strict=False):
        torch.index_select(pixels, 1, index, out=gathered)
        total.addcmul_(gathered, weights)
    return total.bitwise_right_shift_(_FRACTION_BITS).clamp_(0, 255)
