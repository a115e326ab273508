"""Hurt `train`, `sample`, `score` and `cross-eval`, several ways at once, run the same command again, and compare with a run that nothing hurt.

    python tests/faults/campaign.py FOLDER [--faults 15] [--seed 1]

A trial hurts one or two lives of a command and lets the next one finish. Faults: SIGKILL, a worker of two killed, a disk that
takes no longer files, the output folder removed, the input folder away, a clock that jumps by years. Prints the counts as JSON;
exit status 1 if any is bad.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lives
import tiny
from lives import Life

from tdpo_cli.storage.run_dir import damage, epochs_in

AWAY = {"train": (), "sample": ("run",), "score": ("pictures",), "cross-eval": ("run",)}  # what a command reads while it works
FAULTS = ("kill", "worker", "disk", "removed", "away", "clock")
PROMPTS = [f"a {colour} {shape} on a {ground} background" for colour in ("red", "cyan") for shape in ("ring", "cross") for ground in ("black", "tan")]
Result = dict[str, Any]


# --- the commands -------------------------------------------------------------------------------------------------------
def of_run(place: Path, out: Path) -> Result:
    """Rows without timings, weights, previews, and which states and checkpoints there are."""
    found: Result = {f"row {i}": row for i, row in enumerate(tiny.rows(out))}
    for pattern in ("preset.json", "checkpoints/*/*.safetensors", "images/*.png"):
        found |= {str(file.relative_to(out)): file.read_bytes() for file in out.glob(pattern)}
    for part in ("state", "checkpoints"):
        found |= {f"{part}/{folder.name}": "whole" for folder in (out / part).iterdir()}
        found |= {f"{part}/{folder.name}": problem for folder in epochs_in(out / part) if (problem := damage(folder))}
    return found


def of_folder(place: Path, out: Path) -> Result:
    """Every file."""
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"}


def of_scores(place: Path, out: Path) -> Result:
    """Every row, and how they were made."""
    lines = (out / "scores.csv").read_text().splitlines()
    meta = json.loads((out / "scores.meta.json").read_text())
    return {f"row {i}": line for i, line in enumerate(lines)} | {"meta": meta}


def of_cross_eval(place: Path, out: Path) -> Result:
    """Every file, and the model cards of the run. Not the page: the folder's own name is in it."""
    cards = {str(file.relative_to(place)): file.read_bytes() for file in place.glob("run/checkpoints/*/README.md")}
    return {name: content for name, content in of_folder(place, out).items() if not name.endswith(".html")} | cards


@dataclass(frozen=True)
class Command:
    """What is run, again and again with the same words, and what it must leave."""

    arguments: tuple[object, ...]
    result: Callable[[Path, Path], Result]
    out: Callable[[Path], Path] = lambda out: out  # OUT -> the value of --out


def commands(place: Path) -> dict[str, Command]:
    preset = tiny.preset(place, run__save_every=2, run__preview_images=1)
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    sampled, judged = ("--per-prompt", 3, "--batch-size", 2), ("--rewards", "jpeg-compressibility,aesthetic", "--zoo", "sandbox")
    return {
        "train": Command(("train", "--preset", preset, "--resume"), of_run),
        "sample": Command(("sample", place / "run", place / "prompts.txt", *sampled), of_folder),
        "score": Command(("score", place / "pictures", *judged, "--batch-size", 1), of_scores, lambda out: out / "scores.csv"),
        "cross-eval": Command(
            ("cross-eval", place / "run", "--prompts", place / "prompts.txt", "--per-prompt", 2, "--batch-size", 4, *judged), of_cross_eval,
        ),
    }  # fmt: skip


# --- the faults ---------------------------------------------------------------------------------------------------------
class Campaign:
    """Trials in one folder: `run` and `pictures` are read by the commands, OUT is what they write."""

    def __init__(self, place: Path, seed: int):
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.draw, self.commands = place, random.Random(seed), commands(place)
        self.out, self.pristine = place / "out", place / "pristine"
        self.counts: collections.Counter[str] = collections.Counter()
        self.expected: dict[tuple[str, int], tuple[Result, float]] = {}  # (command, processes) -> what it leaves, seconds
        self._undisturbed("train", 1)
        shutil.move(self.out, self.pristine / "run")
        self._inputs()
        self._undisturbed("sample", 1)
        shutil.move(self.out, self.pristine / "pictures")

    def _inputs(self) -> None:
        """`run` and `pictures` as they were before: a cross-evaluation writes into the run's model cards."""
        for name in ("run", "pictures"):
            shutil.rmtree(self.place / name, ignore_errors=True)
            if (self.pristine / name).exists():
                shutil.copytree(self.pristine / name, self.place / name)

    def _life(self, name: str, processes: int, **hurt: Any) -> Life:
        command = self.commands[name]
        return Life(*command.arguments, "--processes", processes, "--out", command.out(self.out), **hurt)

    def _undisturbed(self, name: str, processes: int) -> tuple[Result, float]:
        if (name, processes) not in self.expected:
            started = time.monotonic()
            life = self._life(name, processes)
            assert life.ended(600) and life.status == 0, f"{name} ended with {life.status}:\n{life.text.decode()}"
            length = time.monotonic() - started
            assert life.all_gone(30)
            life.close()
            self.expected[name, processes] = self.commands[name].result(self.place, self.out), length
        return self.expected[name, processes]

    def trial(self, name: str, faults: tuple[str, ...]) -> None:
        """Hurt that command in these ways at once; in two lives one after the other where chance wants it."""
        processes = 2 if "worker" in faults else self.draw.choice((1, 1, 2))
        self._clear()
        expected, length = self._undisturbed(name, processes)
        self._clear()
        self.counts["trials"] += 1
        for _ in range(self.draw.choice((1, 1, 2))):
            if self._hurt(name, processes, faults, length):
                break
        else:
            life = self._life(name, processes)
            life.ended(300)
            self._check(life, name, ("again",))
        self._compare(name, faults, expected, self.commands[name].result(self.place, self.out))

    def _clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self._inputs()

    def _hurt(self, name: str, processes: int, faults: tuple[str, ...], length: float) -> bool:
        """One life. -> whether it finished all the same"""
        disk = int(10 ** self.draw.uniform(1.5, 5.5)) if "disk" in faults else None
        clock = self.draw.randrange(1 << 30) if "clock" in faults else None
        life, moment = self._life(name, processes, disk=disk, clock=clock), self.draw.uniform(0, 0.9 * length)
        hit = []
        for fault in faults:
            if fault not in ("disk", "clock") and not life.ended(moment) and getattr(self, f"_{fault}")(name, life):
                hit.append(fault)
            moment = self.draw.uniform(0, 0.2 * length)  # the next one comes soon
        life.ended(300)
        self._check(life, name, faults)
        self._bring_back()
        if "clock" in faults:
            hit.append("clock")
            for file in (*self.out.rglob("*"), *(self.place / "pictures").iterdir()):
                os.utime(file, (time.time() + self.draw.uniform(-lives.YEARS, lives.YEARS),) * 2)
        if "disk" in faults and life.status == 1 and b"writing failed" in life.text:
            hit.append("disk")
        self.counts.update({"faults": len(hit), **dict.fromkeys(hit, 1), name: 1})
        self.counts["several at once"] += len(hit) > 1
        return life.status == 0 and self.out.exists()

    def _kill(self, name: str, life: Life) -> bool:
        life.kill()
        return life.status == -signal.SIGKILL

    def _worker(self, name: str, life: Life) -> bool:
        workers = life.workers()
        if workers:
            os.kill(self.draw.choice(workers), signal.SIGKILL)
        return bool(workers)

    def _removed(self, name: str, life: Life) -> bool:
        if not self.out.exists():
            return False
        if self.draw.random() < 0.5:
            shutil.move(self.out, self.place / "elsewhere")  # at once
            shutil.rmtree(self.place / "elsewhere")
        else:
            until = time.monotonic() + 2
            while self.out.exists() and time.monotonic() < until:
                shutil.rmtree(self.out, ignore_errors=True)  # file by file; what is written meanwhile keeps its folder
        return True

    def _away(self, name: str, life: Life) -> bool:
        for what in AWAY[name]:
            shutil.move(self.place / what, self.place / f"{what}.away")
        return bool(AWAY[name])

    def _bring_back(self) -> None:
        for away in self.place.glob("*.away"):
            shutil.rmtree(away.with_suffix(""), ignore_errors=True)
            shutil.move(away, away.with_suffix(""))

    # --- judgement --------------------------------------------------------------------------------------------------------
    def _check(self, life: Life, name: str, faults: tuple[str, ...]) -> None:
        """A life ends by itself, with one message, and leaves nobody behind."""
        left = not life.all_gone(20)
        holds_samples = name == "sample" and b"already holds samples" in life.text  # killed behind its last file: nothing is missing
        allowed = {0} if faults == ("again",) else {0, 1}
        allowed |= {-signal.SIGKILL} if "kill" in faults else set()
        allowed |= {2} if "away" in faults or holds_samples else set()
        problems = {
            "hung": life.status is None, "tracebacks": b"Traceback" in life.text, "left behind": left,
            "wrong statuses": life.status not in allowed,
        }  # fmt: skip
        for problem, there in problems.items():
            self.counts[problem] += there
            if there:
                print(f"{problem}: {name}, {faults}, status {life.status}\n{life.text.decode(errors='replace')}", file=sys.stderr)
        life.close()

    def _compare(self, name: str, faults: tuple[str, ...], expected: Result, got: Result) -> None:
        mixed = [key for key in expected.keys() & got.keys() if expected[key] != got[key]]
        found = {"lost": expected.keys() - got.keys(), "too many": got.keys() - expected.keys(), "other content": mixed}
        for what, keys in found.items():
            self.counts[what] += len(keys)
            if keys:
                print(f"{what}: {name}, {faults}: {', '.join(sorted(keys)[:8])}", file=sys.stderr)


BAD = ("hung", "tracebacks", "wrong statuses", "left behind", "lost", "too many", "other content")


def campaign(place: Path, faults: int, seed: int) -> dict[str, Any]:
    """Trials until so many faults have hit and every kind did, each command and each fault in turn, every second trial with two."""
    begun, run = time.monotonic(), Campaign(place, seed)
    number, wanted = 0, (*FAULTS, "several at once")
    while (run.counts["faults"] < faults or not all(run.counts[name] for name in wanted)) and number < 4 * faults:
        name, fault = list(AWAY)[number % len(AWAY)], FAULTS[(number + number // len(FAULTS)) % len(FAULTS)]
        more = run.draw.choice([one for one in FAULTS if one != fault]) if number % 2 else None
        run.trial(name, (fault, more) if more else (fault,))
        number += 1
    return {**dict.fromkeys(BAD, 0), **run.counts, "seed": seed, "seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    outcome = campaign(given.folder, given.faults, given.seed)
    print(json.dumps(outcome))
    raise SystemExit(any(outcome[name] for name in BAD))
