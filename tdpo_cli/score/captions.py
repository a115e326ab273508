"""Which images of a folder to score, and which prompt belongs to each: the only reader of an image folder.

The folder may be a stranger's: what is returned is checked, everything else is a RequestError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdpo_cli.errors import RequestError
from tdpo_cli.score import ahead, listing, png_text
from tdpo_cli.score.listing import listed
from tdpo_cli.storage import outside

METADATA = "metadata.jsonl"  # the imagefolder convention: exactly the images it names
NAME_KEYS, PROMPT_KEYS = ("file_name", "image"), ("prompt", "text")
HOW = f"give --prompt, --prompts FILE, NAME.txt beside NAME.png, or a {METADATA}"
LONGEST_PROMPT = 1_000_000  # bytes of a NAME.txt
THREADS = 8


@dataclass(frozen=True)
class Item:
    name: str  # relative to the folder, with forward slashes
    prompt: str | None


@dataclass(frozen=True)
class Pictures:
    """What is to be scored, and what to tell about the folder."""

    items: list[Item]
    notes: list[str] = field(default_factory=list)


def collect(folder: Path, prompt: str | None, prompts_file: Path | None, follow_links: bool = False) -> Pictures:
    """The folder's images in name order, each with the prompt of the first source that applies. Raises RequestError.

    The sources: `prompt` for all; `prompts_file`; metadata.jsonl; a text file beside each image; a PNG's text.
    follow_links: also what lies outside the folder, by links or by names in metadata.jsonl.
    """
    check(folder, prompt, prompts_file)
    told: Mapping[str, str | None] | None = None
    metadata = folder / METADATA
    if metadata.exists() or metadata.is_symlink():
        _check_inside(folder, [METADATA], follow_links)
        told = _keyed(metadata, folder)
        found = listing.Found(sorted(told))
        listing.check_names(folder, found.names, follow_links)
    else:
        found = listing.find(folder, follow_links)
    if prompt is not None:
        items = [Item(name, prompt) for name in found.names]
    elif prompts_file is not None:
        items = _from_file(prompts_file, folder, found.names)
    elif told is not None:
        items = [Item(name, told[name]) for name in found.names]
    else:
        items = _own_prompts(folder, found.names, follow_links)
    return Pictures(items, found.notes)


def check(folder: Path, prompt: str | None, prompts_file: Path | None) -> None:
    """Whether folder and file can be read. Raises RequestError."""
    listing.check_folder(folder)
    if prompt is not None and prompts_file is not None:
        raise RequestError("--prompt and --prompts exclude each other: give one prompt for all images, or a file of prompts.")
    if prompt is not None and not outside.is_text(prompt):
        raise RequestError(f"--prompt {prompt!r}: not UTF-8 text.")
    if prompts_file is not None:
        _text(prompts_file)


def without_prompt(items: Sequence[Item], folder: Path) -> list[str]:
    """The images that lack a prompt, less those that cannot be opened: these are reported as that."""
    return [item.name for item in items if item.prompt is None and _header(folder / item.name) is not None]


# --- one image's own ----------------------------------------------------------------------------------------------------
def _own_prompts(folder: Path, names: Sequence[str], follow_links: bool) -> list[Item]:
    beside = [Path(name).with_suffix(".txt").as_posix() for name in names]
    _check_inside(folder, beside, follow_links)
    return list(ahead.in_order(lambda name: Item(name, _own_prompt(folder / name)), names, THREADS))


def _own_prompt(path: Path) -> str | None:
    """NAME.txt beside it, else a text chunk inside the PNG."""
    try:
        return outside.read_text(path.with_suffix(".txt"), LONGEST_PROMPT).strip()
    except FileNotFoundError:
        pass
    return png_text.prompt_of(_header(path) or {}) if path.suffix.lower() == ".png" else None


def _header(path: Path) -> dict | None:
    """Pillow's `info`, without decoding pixels; None where it is not an image."""
    try:
        with outside.open_regular(path) as file, outside.open_image(file) as image:
            return dict(image.info)
    except Exception:  # noqa: BLE001 - each of Pillow's parsers raises its own; the reader will say what is wrong
        return None


def _check_inside(folder: Path, names: Sequence[str], follow_links: bool) -> None:
    """RequestError where the text of a file outside the folder would be taken into the rows."""
    inside = listing.Inside(folder)
    leaving = [] if follow_links else [name for name in names if inside.leaves(name)]
    if leaving:
        raise RequestError(f"{folder}: {listed(leaving)} lead out of it by links. {listing.ALLOW}.")


# --- a file of prompts --------------------------------------------------------------------------------------------------
def _from_file(path: Path, folder: Path, names: Sequence[str]) -> list[Item]:
    if path.suffix in (".jsonl", ".csv"):
        told = _keyed(path, folder)
        unknown = sorted(set(told) - set(names))
        if unknown:
            raise RequestError(f"{path}: prompts for {len(unknown)} images that are not in {folder}: {listed(unknown)}.")
        return [Item(name, told.get(name)) for name in names]
    text = _text(path).removesuffix("\n")
    lines = text.split("\n") if text else []
    while len(lines) > len(names) and not lines[-1].strip():
        lines.pop()
    if len(lines) != len(names):
        raise RequestError(
            f"{path}: {len(lines)} prompts for {len(names)} images; expected one line per image in name order "
            "(or a .jsonl or .csv file with file_name and prompt)."
        )
    return [Item(name, line.strip() or None) for name, line in zip(names, lines, strict=True)]


def _keyed(path: Path, folder: Path) -> dict[str, str | None]:
    """Image name -> prompt, of a .jsonl or .csv with `file_name` or `image`, and `prompt` or `text`."""
    told: dict[str, str | None] = {}
    for number, row in outside.rows(path, _text(path)):
        name = next((row[key] for key in NAME_KEYS if row.get(key)), None)
        if not outside.is_text(name) or "\0" in name:
            raise RequestError(f"{path}, line {number}: no image named; expected a `file_name` (or `image`) and a `prompt` (or `text`).")
        prompt = next((row[key] for key in PROMPT_KEYS if row.get(key) is not None), None)
        if prompt is not None and not outside.is_text(prompt):
            raise RequestError(f"{path}, line {number}: the prompt is not a string of text, but {str(prompt)[:40]!r}.")
        name = _relative(name, folder)
        if told.get(name, prompt) != prompt:
            raise RequestError(f"{path}, line {number}: {name} has two prompts.")
        told[name] = prompt
    if not told:
        raise RequestError(f"{path}: no images in it.")
    return told


def _relative(name: str, folder: Path) -> str:
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    return path.as_posix()


def _text(path: Path) -> str:
    try:
        return outside.read_text(path)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such prompt file.") from None
