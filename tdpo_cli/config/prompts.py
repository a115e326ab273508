"""Prompt sources: built-in lists, the sandbox's captions, HPDv2's benchmark, files, standard input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from tdpo_cli.config.fields import suggest
from tdpo_cli.errors import RequestError, first_line

# the list that DDPO published for its animal experiments
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama "
    "camel bat gorilla hedgehog kangaroo"
).split()
# none of the above: what a policy trained on them should be judged by too
HELD_OUT_ANIMALS = ("elephant giraffe panda penguin owl crab octopus leopard otter hamster peacock swan seal hippopotamus flamingo crocodile").split()
HPSV2_STYLES = ("photo", "anime", "concept-art", "paintings")
# source -> the function of sandbox/world.py that makes the list; by name, so that a list of sources needs no torch
SANDBOX_LISTS = {"sandbox": "quickstart_prompts", "sandbox:all": "train_prompts", "sandbox:held-out": "held_out_prompts"}
SOURCES = ("simple-animals", "simple-animals:held-out", *(f"hpsv2:{style}" for style in HPSV2_STYLES), *SANDBOX_LISTS)


def load(source: str) -> list[str]:
    """The prompts of a source, in order, without empty ones. Raises RequestError."""
    if source == "simple-animals":
        return list(ANIMALS)
    if source == "simple-animals:held-out":
        return list(HELD_OUT_ANIMALS)
    if source == "sandbox" or source.startswith("sandbox:"):
        return _sandbox(source)
    if source.startswith("hpsv2:"):
        return _hpsv2(source.removeprefix("hpsv2:"))
    path = Path(source)
    if path.suffix in (".txt", ".jsonl", ".csv"):
        return read_file(path)
    raise _unknown(source)


def check(source: str) -> None:
    """Whether `load` would know the source; a file is read, nothing is downloaded. Raises RequestError."""
    if Path(source).suffix in (".txt", ".jsonl", ".csv") and not source.startswith(("sandbox:", "hpsv2:")):
        read_file(Path(source))
    elif source.startswith("hpsv2:"):
        _check_style(source.removeprefix("hpsv2:"))
    elif source.startswith("sandbox:"):
        _check_sandbox(source)
    elif source not in SOURCES:
        raise _unknown(source)


def from_arguments(arguments: list[str]) -> list[str]:
    """Prompts as given on the command line: literal strings, text files, or - for standard input. Raises RequestError."""
    prompts: list[str] = []
    for argument in arguments:
        if argument == "-":
            try:
                prompts += _lines(sys.stdin.read())
            except UnicodeDecodeError as error:
                raise RequestError(f"standard input: not UTF-8 text: {error}") from None
        elif Path(argument).suffix in (".txt", ".jsonl", ".csv"):
            prompts += read_file(Path(argument))
        else:
            prompts.append(argument)
    if not prompts:
        raise RequestError("no prompts: give strings, a text file with one prompt a line, or - for standard input.")
    return prompts


def read_file(path: Path) -> list[str]:
    """One prompt a line (.txt), or the `prompt` column (.jsonl, .csv). Raises RequestError."""
    if path.exists() and not path.is_file():  # a pipe without a writer would be waited for
        raise RequestError(f"{path}: cannot be read as UTF-8 text: not a regular file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"{path}: no such prompt file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    prompts = _lines(text) if path.suffix not in (".jsonl", ".csv") else _column(path, text)
    if not prompts:
        raise RequestError(f"{path}: no prompts in it.")
    return prompts


def _column(path: Path, text: str) -> list[str]:
    try:
        rows = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else [json.loads(line) for line in _lines(text)]
        prompts = [row["prompt"] for row in rows]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("a prompt is not a string")
        "".join(prompts).encode("utf-8")  # half characters, which JSON can write and no other file can hold
    except (KeyError, TypeError) as error:
        raise RequestError(f"{path}: every row needs a `prompt` ({error}).") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise RequestError(f"{path}: not valid {path.suffix[1:]}: {error}") from None
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def _lines(text: str) -> list[str]:
    # HPSv2's photo list has blank lines, which are no prompts
    return [line.strip() for line in text.splitlines() if line.strip()]


def _sandbox(source: str) -> list[str]:
    _check_sandbox(source)
    from tdpo_cli.sandbox import world

    return getattr(world, SANDBOX_LISTS[source])()


def _check_sandbox(source: str) -> None:
    if source not in SANDBOX_LISTS:
        raise RequestError(f"unknown prompt source {source!r}.{suggest(source, SANDBOX_LISTS)}")


def _check_style(style: str) -> None:
    if style not in HPSV2_STYLES:
        raise RequestError(f"unknown prompt source hpsv2:{style}.{suggest(style, HPSV2_STYLES, prefix='hpsv2:')}")


def _unknown(source: str) -> RequestError:
    return RequestError(f"unknown prompt source {source!r}.{suggest(source, SOURCES)} Or give a .txt, .jsonl or .csv file.")


def _hpsv2(style: str) -> list[str]:
    """A list of HPDv2's benchmark, downloaded once from the hub data set zhwang/HPDv2, then cached."""
    _check_style(style)
    from huggingface_hub import hf_hub_download

    file = f"benchmark/{style}.json"
    try:
        path = Path(hf_hub_download("zhwang/HPDv2", file, repo_type="dataset"))
        return [prompt.strip() for prompt in json.loads(path.read_text(encoding="utf-8")) if prompt.strip()]
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise RequestError(
            f"hpsv2:{style}: {file} of zhwang/HPDv2 is not in the hub cache and could not be fetched: {reason}\n"
            f"Fetch it with: hf download --repo-type dataset zhwang/HPDv2 {file}\n"
            "or give a local list: --set rollout.prompts=FILE.txt"
        ) from None
