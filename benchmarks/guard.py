"""Fail where an epoch, a sampled or a scored image has become slower: CPU time against bare network calls of the same run.

    python benchmarks/guard.py            # exit status 1 if a subject is slower than committed; about 50 CPU seconds
    python benchmarks/guard.py --commit   # measure, and write benchmarks/guard.json

Two things are compared with benchmarks/guard.json. The number of floating-point operations of the network calls is exact: more than
LIMIT times the committed one fails at once. The ratio product / bare of CPU time is the median of PAIRS interleaved pairs; a
median above LIMIT times the committed one is measured once more, with twice as many pairs, and fails if that one is above as well.
Other programs on the machine slow both of a pair down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from calls import Calls, Meter  # noqa: E402
from pairs import in_turn  # noqa: E402
from phases import Epochs, preset_of  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tdpo_cli import rewards  # noqa: E402
from tdpo_cli.config.settings import Model  # noqa: E402
from tdpo_cli.machine.memory import Plan  # noqa: E402
from tdpo_cli.machine.world import World  # noqa: E402
from tdpo_cli.models import loading  # noqa: E402
from tdpo_cli.randomness import Randomness  # noqa: E402
from tdpo_cli.sampling.generate import generate  # noqa: E402
from tdpo_cli.score.captions import Item  # noqa: E402
from tdpo_cli.score.workers import Scorer, Work  # noqa: E402
from tdpo_cli.train.state import build  # noqa: E402

COMMITTED = Path(__file__).with_suffix(".json")
LIMIT = 1.25
PAIRS = 5
STEPS = 3
PROMPTS = [f"a {colour} circle" for colour in ("red", "green", "blue", "yellow")]


@dataclass(frozen=True)
class Subject:
    """A piece of the product's work, and its network calls alone (for files, their decoding too)."""

    product: Callable[[], Any]
    bare: Callable[[], Any]


# --- what is guarded ------------------------------------------------------------------------------------------------------
def epoch(base: str) -> Subject:
    """An epoch of TDPO-R with one reward: 8 samples."""
    preset = preset_of(base, base == "sandbox-flow", 8, STEPS, 4)
    epochs = Epochs(build(preset, World(), Plan.of(8)))
    calls = epochs.calls()
    return Subject(epochs.run, lambda: [calls.replay(phase) for phase in calls.phases])


def recorded(work: Callable[[], Any]) -> Calls:
    """The network calls of a piece of work, as one phase."""
    calls, meter = Calls(), Meter()
    with calls.recording(meter), meter("all"):
        work()
    return calls


def sampled(base: str) -> Subject:
    """The images of `tdpo sample`, without the files: 16 of them."""
    policy = loading.load(Model(base=base), trainable=False).scheduled(STEPS, 0.0)
    work = lambda: list(generate(policy, PROMPTS * 4, range(16), Randomness(0, "sample"), 3.0, 16))
    calls = recorded(work)
    return Subject(work, lambda: calls.replay("all"))


def scored(folder: Path) -> Subject:
    """Two rewards on 24 PNG files of two sizes, as `tdpo score` does it."""
    names = [f"{number}.png" for number in range(24)]
    for number, name in enumerate(names):
        grey = torch.randint(0, 256, (16, 16 if number % 2 else 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        picture = Image.fromarray(grey.numpy())
        picture.resize((16 * picture.width, 16 * picture.height), Image.Resampling.BICUBIC).save(folder / name)
    items = [Item(name, PROMPTS[number % len(PROMPTS)]) for number, name in enumerate(names)]
    scorer = Scorer(Work(folder, ("aesthetic", "hpsv2"), rewards.checkpoints("sandbox", {}), "tdpo", "fp32", ("cpu",), 16), "cpu")
    calls = recorded(lambda: scorer.score(items))

    def bare() -> None:
        for name in names:
            Image.open(folder / name).convert("RGB").load()
        calls.replay("all")

    return Subject(lambda: scorer.score(items), bare)


def subjects(folder: Path) -> dict[str, Callable[[], Subject]]:
    """By name; each is built when it is measured."""
    return {
        "epoch, sandbox": lambda: epoch("sandbox"), "epoch, sandbox-flow": lambda: epoch("sandbox-flow"),
        "image sampled, sandbox": lambda: sampled("sandbox"), "image sampled, sandbox-flow": lambda: sampled("sandbox-flow"),
        "image scored": lambda: scored(folder),
    }  # fmt: skip


# --- measuring and judging ------------------------------------------------------------------------------------------------
def operations(subject: Subject) -> int:
    """Of the network calls; the same on every machine."""
    with FlopCounterMode(display=False) as counter:
        subject.bare()
    return counter.get_total_flops()


def ratio(subject: Subject, pairs: int) -> float:
    """product / bare by CPU time, the median of interleaved pairs."""
    times = in_turn({"product": subject.product, "bare": subject.bare}, pairs)
    return statistics.median(ours[1] / bare[1] for ours, bare in zip(times["product"], times["bare"], strict=True))


def judge(name: str, work: int, measure: Callable[[int], float], committed: dict[str, float], pairs: int = PAIRS) -> tuple[bool, str]:
    """Whether a subject holds, and a line that says what was found. `measure(pairs)` gives a ratio."""
    if work > LIMIT * committed["operations"]:
        return False, f"{name}: {work:.3g} floating-point operations of network calls, committed {committed['operations']:.3g}"
    limit, found = LIMIT * committed["ratio"], [measure(pairs)]
    if found[0] > limit:
        found.append(measure(2 * pairs))
    tries = ", then ".join(f"{one:.2f}" for one in found)
    return found[-1] <= limit, f"{name}: product / bare {tries}; committed {committed['ratio']:.2f}, limit {limit:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", action="store_true", help=f"write {COMMITTED.name} instead of comparing with it")
    parser.add_argument("--pairs", type=int, help=f"[default: {PAIRS}; with --commit {4 * PAIRS + 1}]")
    options = parser.parse_args()
    pairs = options.pairs or (4 * PAIRS + 1 if options.commit else PAIRS)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    committed = {} if options.commit else json.loads(COMMITTED.read_text())
    found, slower = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for name, make in subjects(Path(folder)).items():
            subject = make()
            if options.commit:
                found[name] = {"ratio": round(ratio(subject, pairs), 3), "operations": operations(subject)}
                print(f"{name}: {found[name]}", flush=True)
                continue
            holds, line = judge(name, operations(subject), lambda count, subject=subject: ratio(subject, count), committed[name], pairs)
            slower |= not holds
            print(line if holds else f"SLOWER: {line}", flush=True)
    if options.commit:
        COMMITTED.write_text(json.dumps(found, indent=2) + "\n")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
