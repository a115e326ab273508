"""Score chunks of an image folder, in this process or in several, one device each, with the same result."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdpo_cli import rewards
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.rewards import preprocess, scoring
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.preprocess import Square
from tdpo_cli.score import request
from tdpo_cli.score.captions import Item
from tdpo_cli.score.images import UnreadableImage, read_ahead
from tdpo_cli.score.score_file import Row

PENDING_BYTES = 256e6  # of decoded images that wait for others of their size
PIXELS_A_CALL = 16e6  # images of one call together: 200 MB as float32
DTYPES = dict(zip(request.DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))

# a GPU that answers nothing any more; older torch raises RuntimeError
DEVICE_IS_LOST = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
UNREADABLE = "cannot be read: "
Problem = tuple[str, str]  # image, what is wrong


@dataclass(frozen=True)
class Work:
    """What every process needs to know."""

    folder: Path
    rewards: tuple[str, ...]
    checkpoints: Mapping[str, str]
    variant: str
    dtype: str
    devices: tuple[str, ...]  # one process each
    batch_size: int
    place: tuple[int, int] | None = None  # of the folder on its disk, when its images were listed

    @property
    def chunk(self) -> int:
        """Images that are scored together. Fixed by position, so that batches do not depend on who scores them or on interruptions."""
        return 4 * self.batch_size


def place_of(folder: Path) -> tuple[int, int] | None:
    """What stays the same while a folder is the same one; None where there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# --- one process --------------------------------------------------------------------------------------------------------
class Scorer:
    """The rewards of a piece of work on one device."""

    def __init__(self, work: Work, device: str):
        self.work, self.device = work, torch.device(device)
        self.threads = max(1, min(8, (os.cpu_count() or 1) // len(work.devices)))
        self.rewards = scoring.load_rewards(work.rewards, Backbones(self.device, DTYPES[work.dtype]), work.checkpoints, work.variant)
        self.squares = self._squares()

    def _squares(self) -> tuple[Square, ...]:
        """What the rewards see of an image, where this is a square for all of them; on a CPU, which resizes as fast while it decodes."""
        seen = [getattr(reward, "square", None) for reward in self.rewards.values()]
        return () if None in seen or self.device.type != "cpu" else tuple(dict.fromkeys(seen))

    def describe(self) -> dict[str, dict[str, Any]]:
        return {name: reward.describe() for name, reward in self.rewards.items()}

    def score(self, items: Sequence[Item], advance: Callable[[int], None] = lambda n: None) -> tuple[list[Row], list[Problem]]:
        """One row per item, in order, None where there is no score; and why. Raises WorkError, RequestError."""
        rows: list[Row] = [{"image": item.name, "prompt": item.prompt, **dict.fromkeys(self.work.rewards)} for item in items]
        problems: list[Problem] = []
        buckets: dict[tuple[int, ...], list[tuple[int, tuple[Tensor, ...]]]] = {}  # by size: one call needs images of one size
        waiting = 0

        def flush(size: tuple[int, ...]) -> int:
            bucket = buckets.pop(size)
            problems.extend(self._score(rows, bucket))
            advance(len(bucket))
            return sum(pixels.nbytes for _, seen in bucket for pixels in seen)

        with contextlib.closing(read_ahead([self.work.folder / item.name for item in items], self.threads, self.squares)) as stream:
            for index, seen in enumerate(stream):
                if isinstance(seen, UnreadableImage):
                    problems.append((items[index].name, f"{UNREADABLE}{seen}"))
                    advance(1)
                    continue
                size = tuple(seen[0].shape[1:])
                buckets.setdefault(size, []).append((index, seen))
                waiting += sum(pixels.nbytes for pixels in seen)
                if len(buckets[size]) >= max(1, min(self.work.batch_size, PIXELS_A_CALL // math.prod(size))):
                    waiting -= flush(size)
                elif waiting > PENDING_BYTES:
                    waiting -= sum(flush(one) for one in list(buckets))
        for size in list(buckets):
            flush(size)
        self._check_folder(problems)
        self._check_rewards(rows, problems)
        return rows, problems

    def _check_folder(self, problems: Sequence[Problem]) -> None:
        """WorkError where images cannot be read because their folder went away, as a network disk does: no single image is to blame.

        The chunk is not written, so that the same command tries it again.
        """
        unreadable = [image for image, problem in problems if problem.startswith(UNREADABLE)]
        if unreadable and self.work.place not in (None, place_of(self.work.folder)):
            raise WorkError(
                f"{self.work.folder}: the folder of images was removed, moved or replaced, so {unreadable[0]} cannot be read. "
                "The rows so far are kept; the same command goes on from there."
            )

    def _check_rewards(self, rows: Sequence[Row], problems: Sequence[Problem]) -> None:
        """WorkError where a reward failed on every image of a chunk: it is the reward that is broken, or what it needs is gone.

        The chunk is not written, so that the same command tries it again.
        """
        readable = len(rows) - sum(problem.startswith(UNREADABLE) for _, problem in problems)
        for name in self.work.rewards:
            failed = [problem for _, problem in problems if problem.startswith(f"{name} failed: ")]
            if len(failed) == readable > 1:
                raise WorkError(f"reward {name} failed on every one of {readable} images, {rows[0]['image']} to {rows[-1]['image']}: {failed[0]}")

    def _score(self, rows: list[Row], batch: Sequence[tuple[int, tuple[Tensor, ...]]]) -> Iterator[Problem]:
        """Fill the rows of a batch."""
        mine = [rows[index] for index, _ in batch]
        prompts = [row["prompt"] or "" for row in mine]
        inputs = self._inputs([seen for _, seen in batch])
        with preprocess.resizing_once():
            scores = {name: self._scores(name, reward, inputs[name], prompts) for name, reward in self.rewards.items()}
        for name, found in scores.items():
            for row, score in zip(mine, found, strict=True):
                if isinstance(score, str):
                    yield row["image"], score
                elif math.isfinite(score):
                    row[name] = float(str(np.float32(score)))  # the shortest digits that mean this float32
                else:
                    yield row["image"], f"{name} gave {score}"

    def _inputs(self, batch: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Each reward's images of a batch: its square of them, or the whole images as levels or floats."""
        # stacked as decoded, with the colours last: Pillow resizes that without another copy
        stacked = [
            torch.stack([pixels.permute(1, 2, 0) for pixels in column]).permute(0, 3, 1, 2).to(self.device) for column in zip(*batch, strict=True)
        ]
        if self.squares:
            return {name: stacked[self.squares.index(reward.square)] for name, reward in self.rewards.items()}
        images = None if rewards.TAKES_LEVELS.issuperset(self.rewards) else preprocess.quantise(stacked[0]).div_(255)
        return {name: stacked[0] if name in rewards.TAKES_LEVELS else images for name in self.rewards}

    def _scores(self, name: str, reward: rewards.Reward, images: Tensor, prompts: list[str]) -> list[float | str]:
        """A number per image; where the reward fails, the halves of the batch are tried, and one image alone gets the reason instead.

        Raises RequestError, WorkError: what a reward raises when no single image is to blame.
        """
        try:
            return scoring.score_images({name: reward}, images, prompts, len(images))[name].tolist()
        except (RequestError, WorkError):
            raise
        except Exception as error:  # noqa: BLE001 - a custom reward may raise anything
            if isinstance(error, DEVICE_IS_LOST):
                raise WorkError(f"reward {name} failed: {type(error).__name__}: {first_line(error)}") from error
            if len(images) == 1:
                return [f"{name} failed: {type(error).__name__}: {first_line(error)}"]
        half = len(images) // 2
        return [score for part in (slice(None, half), slice(half, None)) for score in self._scores(name, reward, images[part], prompts[part])]

    def half_precision_difference(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Reward -> largest and mean |score - float32 score|, on the first images of one size."""
        readable = [
            (item, seen[0])
            for item, seen in zip(items, read_ahead([self.work.folder / item.name for item in items], self.threads), strict=True)
            if not isinstance(seen, UnreadableImage)
        ]
        same = [(item.prompt or "", pixels) for item, pixels in readable if pixels.shape == readable[0][1].shape][: self.work.batch_size]
        if not same:
            return {}
        prompts, pixels = zip(*same, strict=True)
        images = torch.stack(pixels).to(self.device).float().div_(255)
        return {
            name: scoring.half_precision_difference(
                name, DTYPES[self.work.dtype], images, prompts,
                device=self.device, checkpoint=self.work.checkpoints.get(name), variant=self.work.variant,
            )
            for name, reward in self.rewards.items()
            if "dtype" in reward.describe()["preprocessing"]  # the others have no network
        }  # fmt: skip


# --- one or several -----------------------------------------------------------------------------------------------------
class Team:
    """The scorers of a piece of work: one in this process, or one in each of several."""

    def __init__(self, work: Work, pool: ProcessPoolExecutor | None):
        self.work, self.pool = work, pool
        self.here = None if pool else Scorer(work, work.devices[0])

    def ask(self, method: str, *arguments: Any) -> Any:
        """What one of the scorers answers."""
        if self.here:
            return getattr(self.here, method)(*arguments)
        return self._result(self.pool.submit(_call, method, *arguments))

    def score(self, items: Sequence[Item], advance: Callable[[int], None]) -> Iterator[tuple[list[Row], list[Problem]]]:
        """Rows and problems chunk by chunk, in order. At most two chunks a process are under way."""
        chunks = (items[start : start + self.work.chunk] for start in range(0, len(items), self.work.chunk))
        if self.here:
            for chunk in chunks:
                yield self.here.score(chunk, advance)
            return
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append(self.pool.submit(_call, "score", chunk))
            if len(waiting) >= 2 * len(self.work.devices):
                yield self._finished(waiting, advance)
        while waiting:
            yield self._finished(waiting, advance)

    def _finished(self, waiting: deque, advance: Callable[[int], None]) -> tuple[list[Row], list[Problem]]:
        rows, problems = self._result(waiting.popleft())
        advance(len(rows))
        return rows, problems

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise WorkError(
                f"one of {len(self.work.devices)} scoring processes died (killed, or out of memory?). "
                "The rows so far are kept; the same command goes on from there."
            ) from None


@contextlib.contextmanager
def team(work: Work) -> Iterator[Team]:
    """Start the processes, where more than one is wanted, and end them."""
    if len(work.devices) == 1:
        yield Team(work, None)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    ranks = context.Queue()
    for rank in range(len(work.devices)):
        ranks.put(rank)
    pool = ProcessPoolExecutor(len(work.devices), context, _start, (work, ranks, torch.get_num_threads()))
    try:
        yield Team(work, pool)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        raise


_mine: tuple[Work, str] | None = None  # in a worker: what to do, and where


def _start(work: Work, ranks: Any, threads: int) -> None:
    """A worker's first act. The networks are loaded with the first task, whose errors reach the parent."""
    global _mine
    _mine = work, work.devices[ranks.get()]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // len(work.devices))))
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@cache
def _scorer() -> Scorer:
    return Scorer(*_mine)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_scorer(), method)(*arguments)
