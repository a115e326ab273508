"""Which images of a folder to score, and which prompt belongs to each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tdpo_cli.errors import RequestError
from tdpo_cli.score import listing

METADATA = "metadata.jsonl"  # the imagefolder convention: exactly the images it names
PNG_CHUNKS = ("prompt", "parameters")
NAME_KEYS, PROMPT_KEYS = ("file_name", "image"), ("prompt", "text")
HOW = f"give --prompt, --prompts FILE, NAME.txt beside NAME.png, or a {METADATA}"


@dataclass(frozen=True)
class Item:
    name: str  # relative to the folder, with forward slashes
    prompt: str | None


def collect(folder: Path, prompt: str | None, prompts_file: Path | None) -> list[Item]:
    """The folder's images in name order, each with the prompt of the first source that applies. Raises RequestError.

    The sources: `prompt` for all; `prompts_file`; metadata.jsonl; a text file beside each image; a PNG's text.
    """
    check(folder, prompt, prompts_file)
    told: Mapping[str, str | None] | None = None
    if (folder / METADATA).is_file():
        told = _keyed(folder / METADATA, folder)
        names = sorted(told)
    else:
        names = listing.find(folder)
    if prompt is not None:
        return [Item(name, prompt) for name in names]
    if prompts_file is not None:
        return _from_file(prompts_file, folder, names)
    if told is not None:
        return [Item(name, told[name]) for name in names]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: Item(name, _own_prompt(folder / name)), names, chunksize=64))


def check(folder: Path, prompt: str | None, prompts_file: Path | None) -> None:
    """Whether folder and file can be read. Raises RequestError."""
    listing.check_folder(folder)
    if prompt is not None and prompts_file is not None:
        raise RequestError("--prompt and --prompts exclude each other: give one prompt for all images, or a file of prompts.")
    if prompts_file is not None:
        _text(prompts_file)


def without_prompt(items: Sequence[Item], folder: Path) -> list[str]:
    """The images that lack a prompt, less those that cannot be opened: these are reported as that."""
    return [item.name for item in items if item.prompt is None and _header(folder / item.name) is not None]


# --- one image's own ----------------------------------------------------------------------------------------------------
def _own_prompt(path: Path) -> str | None:
    """NAME.txt beside it, else a text chunk inside the PNG."""
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path.with_suffix('.txt')}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix.lower() != ".png":
        return None
    info = _header(path) or {}
    return next((info[key].strip() for key in PNG_CHUNKS if isinstance(info.get(key), str)), None)


def _header(path: Path) -> dict | None:
    """Pillow's `info`, without decoding pixels; None where it is no image."""
    try:
        with Image.open(path) as image:
            return dict(image.info)
    except Exception:  # noqa: BLE001 - each of Pillow's parsers raises its own; the reader will say what is wrong
        return None


# --- a file of prompts --------------------------------------------------------------------------------------------------
def _from_file(path: Path, folder: Path, names: Sequence[str]) -> list[Item]:
    if path.suffix in (".jsonl", ".csv"):
        told = _keyed(path, folder)
        unknown = sorted(set(told) - set(names))
        if unknown:
            raise RequestError(f"{path}: prompts for {len(unknown)} images that are not in {folder}: {listed(unknown)}.")
        return [Item(name, told.get(name)) for name in names]
    lines = _text(path).splitlines()
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
    for number, row in _rows(path):
        name = next((row[key] for key in NAME_KEYS if row.get(key)), None)
        if not isinstance(name, str):
            raise RequestError(f"{path}, line {number}: no image named; expected a `file_name` (or `image`) and a `prompt` (or `text`).")
        prompt = next((row[key] for key in PROMPT_KEYS if row.get(key) is not None), None)
        if prompt is not None and not isinstance(prompt, str):
            raise RequestError(f"{path}, line {number}: the prompt is not a string: {json.dumps(prompt)}.")
        name = _relative(name, folder)
        if told.get(name, prompt) != prompt:
            raise RequestError(f"{path}, line {number}: {name} has two prompts.")
        told[name] = prompt
    if not told:
        raise RequestError(f"{path}: no images in it.")
    return told


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    text = _text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number}: not valid JSON: {error}.") from None
        if not isinstance(row, dict):
            raise RequestError(f"{path}, line {number}: expected an object with `file_name` and `prompt`.")
        yield number, row


def _relative(name: str, folder: Path) -> str:
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    return path.as_posix()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"{path}: no such prompt file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
