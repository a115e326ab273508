"""Which of a short ladder of plans fits into memory. No torch here: `--dry-run` answers at once.

A plan cuts the work into pieces; it never changes the result beyond rounding. What is computed stays the same on every rung.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tdpo_cli.config.settings import Preset
from tdpo_cli.console import size
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import footprint
from tdpo_cli.machine.networks import networks

MARGIN = 0.9  # of what is free; the rest is for fragmentation and what an estimate does not know
CPU_MICRO_BATCH = 48  # larger gains nothing on a CPU
DECODED = 8  # images per VAE call where only images are made
CARDS = (16, 24, 48, 80)  # GiB, sold as GB
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Plan:
    """How an epoch's work is cut up on one device."""

    micro_batch: int  # samples per forward and backward pass
    sample_batch: int  # samples denoised at a time
    decode_chunk: int  # images per VAE and encoder call
    checkpointing: bool = False  # recompute the denoising network's activations in the backward pass: a third slower, a fraction of the memory
    park: bool = False  # scorers wait in main memory while they are not used
    offload: bool = False  # the trajectory waits in main memory (pinned)

    @classmethod
    def of(cls, micro_batch: int) -> Plan:
        """The plain plan with that micro-batch: all that runs recorded before there were plans."""
        return cls(micro_batch, micro_batch, CPU_MICRO_BATCH)

    def __str__(self) -> str:
        extras = [name for name, used in (
            ("gradient checkpointing", self.checkpointing), ("scorers parked", self.park), ("trajectory offloaded", self.offload),
        ) if used]  # fmt: skip
        sizes = f"micro-batch {self.micro_batch}", f"sampling {self.sample_batch}", f"decoding {self.decode_chunk} at a time"
        return ", ".join([*sizes, *extras])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def smaller(self, samples: int) -> Plan | None:
        """The next rung down for a process with that many samples; None below the last."""
        micro = min(self.micro_batch, samples)
        if micro > 1:
            half = micro // 2
            return replace(
                self, micro_batch=half, sample_batch=min(self.sample_batch, half), decode_chunk=max(1, min(self.decode_chunk, samples) // 2)
            )
        last = Plan(1, 1, 1, checkpointing=True, park=True, offload=True)
        return None if self == last else last


# from roomy to tight: what costs no time goes first, recomputing last
GPU_LADDER = (
    Plan(32, 32, 16), Plan(16, 16, 16), Plan(8, 16, 16), Plan(8, 16, 8, park=True), Plan(4, 16, 8, park=True), Plan(4, 8, 4, park=True, offload=True),
    Plan(2, 4, 2, park=True, offload=True), Plan(1, 2, 1, park=True, offload=True),
    Plan(2, 2, 1, checkpointing=True, park=True, offload=True), Plan(1, 1, 1, checkpointing=True, park=True, offload=True),
)  # fmt: skip
# main memory is all there is: nothing to park in, nothing to offload to
CPU_LADDER = (
    *(Plan(n, n, n) for n in (CPU_MICRO_BATCH, 24, 12, 6, 3, 1)), Plan(2, 1, 1, checkpointing=True), Plan(1, 1, 1, checkpointing=True)
)  # fmt: skip
USUAL = Plan(4, 8, 8, park=True)  # what a dry run predicts


def ladder(preset: Preset, gpu: bool) -> tuple[Plan, ...]:
    """The plans for a device, roomiest first; a micro-batch that the preset asks for stays."""
    plans = GPU_LADDER if gpu else CPU_LADDER
    asked = preset.run.micro_batch
    if asked is None:
        return plans
    return tuple(dict.fromkeys(replace(plan, micro_batch=asked, sample_batch=asked) for plan in plans))


def estimate(preset: Preset, processes: int = 1, plan: Plan = USUAL, gpu: bool = True) -> int:
    """Bytes at the peak of one process: of its GPU, or of the process itself on a CPU."""
    return max(phases(preset, processes, plan, gpu).values())


def phases(preset: Preset, processes: int = 1, plan: Plan = USUAL, gpu: bool = True) -> dict[str, int]:
    """The same for each part of an epoch."""
    nets = networks(preset)
    gpu = gpu and not nets.embedded
    bytes_each = 4 if preset.model.dtype == "fp32" or not gpu else 2
    mine = -(-preset.rollout.samples_per_epoch // processes)
    guided = footprint.calls(preset, nets)
    scorers = footprint.scorer_bytes(preset, nets)
    looked = 0 if nets.embedded else footprint.SCORER_IMAGE_BYTES
    images = mine * nets.pixels * 3 * 4
    parked = plan.park and gpu
    resting, encoder, scorer = (0, *footprint.largest_scorers(preset, nets)) if parked else (scorers, scorers, scorers)
    base = footprint.CUDA_CONTEXT if gpu else footprint.LIBRARIES
    leaving = footprint.leaving_bytes(preset, nets, bytes_each) if gpu else 0
    always = base + footprint.weight_bytes(preset, nets, bytes_each) - leaving
    clean = footprint.clean_bytes(preset, nets, processes)
    if not (plan.offload and gpu):
        always += footprint.trajectory_bytes(preset, nets, processes)
    else:
        images = clean = 0
    rows = min(plan.micro_batch, -(-preset.update.batch_size // processes))
    parts = {
        "sampling": min(plan.sample_batch, mine) * guided * footprint.forward_bytes(nets, bytes_each),
        "decoding": min(plan.decode_chunk, mine * preset.rollout.steps) * max(footprint.decode_bytes(nets, bytes_each), looked),
        "scoring": min(plan.decode_chunk, mine) * looked,
        "training": rows * guided * footprint.backward_bytes(nets, bytes_each, plan.checkpointing),
    }
    resident = {"sampling": resting + clean, "decoding": encoder + images + clean, "scoring": scorer + images, "training": resting}
    copies = 1.0 if gpu else footprint.CPU_COPIES
    encoding = {"encoding": int(base + footprint.encoding_bytes(preset, nets, bytes_each))} if leaving else {}
    return encoding | {name: int(always + resident[name] + copies * part) for name, part in parts.items()}


def choose(preset: Preset, limit: int | None, processes: int = 1, gpu: bool = True) -> Plan:
    """The roomiest plan whose estimate is within `limit` bytes (None: no limit). Raises RequestError if none is."""
    plans = ladder(preset, gpu)
    if limit is None:
        return plans[0]
    for plan in plans:
        if estimate(preset, processes, plan, gpu) <= limit:
            return plan
    least = min(estimate(preset, processes, plan, gpu) for plan in plans)
    ways = advice(preset, plans[-1].micro_batch).removeprefix("Lower, in this order: ")
    raise RequestError(f"{size(limit)} of memory are too little: the smallest plan needs about {size(least)}. Allow more, or lower: {ways}")


def cards(preset: Preset) -> dict[str, dict[str, Any]]:
    """GiB of a card -> the roomiest plan that it holds and what the smallest plan needs; where none fits, how to quantise so that one does."""
    found = {}
    for card in CARDS:
        room = MARGIN * card * footprint.GiB
        plan, least = _roomiest(preset, room)
        smaller = None
        if plan is None and preset.model.quantise is None and preset.model.lora_rank > 0:
            quantised = {kind: replace(preset, model=replace(preset.model, quantise=kind)) for kind in ("int8", "nf4")}
            smaller = next((kind for kind, one in quantised.items() if _roomiest(one, room)[0] is not None), None)
        found[str(card)] = {"plan": plan and plan.as_dict(), "least_memory_bytes": least, "quantise": smaller}
    return found


def _roomiest(preset: Preset, room: float) -> tuple[Plan | None, int]:
    """The first plan of a GPU's ladder that fits, and the bytes of the smallest."""
    needs = {plan: estimate(preset, 1, plan) for plan in ladder(preset, gpu=True)}
    return next((plan for plan, need in needs.items() if need <= room), None), min(needs.values())


def card_lines(held: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What `cards` found, in words."""
    return [(f"{card} GB card", _card_words(**one)) for card, one in held.items()]


def _card_words(plan: dict[str, Any] | None, least_memory_bytes: int, quantise: str | None) -> str:
    if plan is None:
        way = f"; holds it with model.quantise={quantise}" if quantise else ""
        return f"too small: needs {size(least_memory_bytes)}{way}"
    return f"micro-batch {plan['micro_batch']}" + (", gradient checkpointing" if plan["checkpointing"] else "")


def sample_batch(preset: Preset, free: int | None) -> int:
    """Images denoised at a time where nothing trains: as many as fit into the free bytes of a GPU; None is a CPU."""
    if preset.run.micro_batch is not None or free is None:
        return preset.run.micro_batch or CPU_MICRO_BATCH
    nets, number = networks(preset), 4 if preset.model.dtype == "fp32" else 2
    left = MARGIN * free - footprint.weight_bytes(preset, nets, number) - footprint.CUDA_CONTEXT - DECODED * footprint.decode_bytes(nets, number)
    fitting = [size for size in (32, 16, 8, 4, 2) if size * 2 * footprint.forward_bytes(nets, number) < left]
    return (fitting or [1])[0]


def parse(text: str) -> int | None:
    """run.memory_limit: a size, or `auto` -> None. Raises RequestError."""
    return None if text.strip().lower() == "auto" else parse_size("run.memory_limit", text, ", or auto")


def parse_size(key: str, text: str, otherwise: str = "") -> int:
    """`12GB`, `800 MiB`, a number of bytes -> bytes, at least 1; `key` is the setting. Raises RequestError."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    if unit is None or float(match.group(1)) * unit < 1:
        raise RequestError(f"{key} {text!r}: expected a size such as 12GB or 800MiB{otherwise}.")
    return int(float(match.group(1)) * unit)


def limit(preset: Preset, free: int | None, gpu: bool, processes: int = 1) -> int | None:
    """Bytes a process may use: what the preset says; else what is free on a GPU; on a CPU too, where the roomiest plan would not fit.

    On a CPU the smallest plan is always allowed: what is free there is a guess, and memory can be swapped.
    """
    asked = preset.run.memory_limit
    if asked is None and not gpu:
        needs = [estimate(preset, processes, plan, gpu) for plan in ladder(preset, gpu)]
        return None if free is None or needs[0] <= MARGIN * free else max(int(MARGIN * free), min(needs))
    said = parse(asked) if asked is not None else None
    return said if said is not None else None if free is None else int(MARGIN * free)


def main_memory() -> tuple[int | None, int | None]:
    """Total and free bytes of this machine, None where unknown."""
    import os

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return total, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total, None


def exhausted(error: BaseException) -> bool:
    """Whether this is what a GPU, a CPU's allocator or Python says when memory runs out."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def advice(preset: Preset, micro_batch: int) -> str:
    """Which settings to lower, those first that leave the result as it is."""
    ways = list(_ways(preset, micro_batch))
    return "Lower, in this order: " + "; ".join(ways) + "."


def _ways(preset: Preset, micro_batch: int) -> Iterator[str]:
    if micro_batch > 1:
        yield f"run.micro_batch={max(1, micro_batch // 2)} (it is {micro_batch}; the result stays the same)"
    if preset.model.dtype == "fp32":
        yield "model.dtype=fp16 (on a GPU)"
    if preset.model.lora_rank == 0:
        yield "model.lora_rank=4 instead of the whole network"
    if preset.reward.watch:
        yield "fewer rewards in reward.watch"
    yield f"rollout.samples_per_epoch (it is {preset.rollout.samples_per_epoch}), or share them among more processes"
