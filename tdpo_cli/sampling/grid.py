"""Draw images as one labelled grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_TILE = 128  # px; smaller images are enlarged without smoothing
MARGIN = 8


def to_pil(image: Tensor) -> Image.Image:
    """[3,H,W] float in [0,1] -> 8 bits, rounded"""
    levels = (image.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def draw(images: Sequence[Image.Image], labels: Sequence[str], columns: int, title: str | None = None) -> Image.Image:
    """Row by row, each image above its label, a title on top."""
    width, height = images[0].size
    scale = max(1, -(-SMALLEST_TILE // width))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=12)
    wrapped = [textwrap.wrap(label, width=max(8, int(width / 6.2)))[:4] for label in labels]
    line = 15
    label_height = line * max((len(lines) for lines in wrapped), default=0) + 4
    header = 26 if title else 0
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, header + rows * (height + label_height + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((MARGIN, 6), title, fill="black", font=ImageFont.load_default(size=15))
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x = MARGIN + (i % columns) * (width + MARGIN)
        y = header + MARGIN + (i // columns) * (height + label_height + MARGIN)
        page.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS), (x, y))
        for n, text in enumerate(lines):
            pen.text((x, y + height + 2 + n * line), text, fill="#444444", font=font)
    return page
