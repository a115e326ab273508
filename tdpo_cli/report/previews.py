"""The strip of preview images: before training, and one image per epoch under a slider."""

from __future__ import annotations

from pathlib import Path

from tdpo_cli.report import pictures
from tdpo_cli.report.html import data, escape

SMALL = 700  # px; images up to this width stand side by side


def render(folder: Path, count: int) -> str:
    """Of a run folder; `count`: previews in an image, of which four stand in a row."""
    files = [file for file in (folder / "images").glob("*.png") if file.stem == "before" or _epoch_of(file) is not None]
    files.sort(key=lambda file: -1 if file.stem == "before" else _epoch_of(file))
    shown = pictures.fit(files)
    if not shown.pictures:
        why = "run.preview_images is 0" if count == 0 else "no preview image is written yet"
        return f"<p>No pictures: {why}.</p>"
    labels = ["before training" if files[i].stem == "before" else f"epoch {_epoch_of(files[i])}" for i in shown.places]
    last = shown.pictures[-1]
    kind = "strip" + (" small" if last.width <= SMALL else "") + (" four" if count >= 4 else "")
    moving = f'<figure class="now"><figcaption><output>{escape(labels[-1])}</output></figcaption>{_halves(last, labels[-1])}</figure>'
    if len(labels) == 1:
        return f'<div class="{kind}"><div class="shots">{moving}</div></div>'
    end = len(labels) - 1
    controls = (
        '<div class="controls"><button type="button" class="back" aria-label="one image back">◀</button>'
        f'<input type="range" min="0" max="{end}" value="{end}" step="1" aria-label="epoch" aria-valuetext="{escape(labels[-1])}">'
        '<button type="button" class="on" aria-label="one image on">▶</button>'
        '<button type="button" class="hold">hold to see the first</button></div>'
    )
    first = f'<figure class="first"><figcaption>{escape(labels[0])}</figcaption>{_halves(shown.pictures[0], labels[0])}</figure>'
    # the first and the last stand in the page itself; the script finds the others here
    frames = [[label, None if i in (0, end) else picture.uri] for i, (label, picture) in enumerate(zip(labels, shown.pictures, strict=True))]
    note = f"<p class=note>{escape(shown.left_out)} All are in images/ of the run folder.</p>" if shown.left_out else ""
    return f'<div class="{kind}"><div class="shots">{first}{moving}</div>{controls}{note}{data(frames, "frames")}</div>'


def _halves(picture: pictures.Picture, label: str) -> str:
    """The image in two windows, left half and right half, side by side or, on a phone, one above the other; the script fills the second."""
    box = f'width="{picture.width}" height="{picture.height}"'
    return (
        f'<div class="halves" style="--wide:{picture.width}px"><div><img src="{picture.uri}" {box} alt="preview images, {escape(label)}"></div>'
        f'<div aria-hidden="true"><img {box} alt=""></div></div>'
    )


def _epoch_of(file: Path) -> int | None:
    number = file.stem.removeprefix("epoch_")
    return int(number) if number.isascii() and number.isdigit() and number != file.stem else None
