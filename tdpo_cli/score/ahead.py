"""Work on a list by threads, ahead of use and in order, within a budget. A thread that hangs is not waited for at the end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

# seconds that threads have to end their task: one that decodes while the interpreter shuts down can abort the process
PATIENCE = 0.5
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int, cost: Callable[[Item], int] = lambda item: 0, budget: int = 1
) -> Iterator[Result]:
    """work(item) of every item, at most two a thread ahead of use; those under way and not used yet cost `budget` together at most.

    One item that costs more than all of the budget is worked on alone. The threads are daemons: a read that never ends, as of a
    network disk that is gone, delays neither Ctrl-C nor the end of the process. An error of `work` or `cost` is raised here.
    """
    crew = _Crew(work, cost, budget, threads)
    waiting: deque[_Task] = deque()
    try:
        for turn, item in enumerate(items):
            waiting.append(crew.begin(turn, item))
            if len(waiting) > 2 * threads:
                yield crew.finish(waiting.popleft())
        while waiting:
            yield crew.finish(waiting.popleft())
    finally:
        crew.stop()


class _Task:
    def __init__(self, turn: int, item: Any):
        self.turn, self.item, self.cost = turn, item, 0
        self.done, self.result, self.error = False, None, None


class _Crew:
    def __init__(self, work: Callable, cost: Callable, budget: int, threads: int):
        self.work, self.cost, self.budget = work, cost, budget
        self.tasks: SimpleQueue = SimpleQueue()
        self.changed = threading.Condition()
        self.used, self.turn, self.stopped = 0, 0, False
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def begin(self, turn: int, item: Any) -> _Task:
        task = _Task(turn, item)
        self.tasks.put(task)
        return task

    def finish(self, task: _Task) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: task.done)
            self.used -= task.cost
            self.changed.notify_all()
        if task.error is not None:
            raise task.error
        return task.result

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for _ in self.threads:
            self.tasks.put(None)
        end = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            error, cost, result = None, 0, None
            try:
                cost = self.cost(task.item)
            except BaseException as raised:  # noqa: BLE001 - it is raised where the result is asked for
                error = raised
            if not self._take(task, cost):
                return
            if error is None:
                try:
                    result = self.work(task.item)
                except BaseException as raised:  # noqa: BLE001 - as above
                    error = raised
            with self.changed:
                task.result, task.error, task.done = result, error, True
                self.changed.notify_all()

    def _take(self, task: _Task, cost: int) -> bool:
        """Wait for the task's share of the budget, in order: else the one that is asked for next could wait for those behind it."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.turn == task.turn and (not self.used or self.used + cost <= self.budget))
            if self.stopped:
                return False
            self.turn, self.used, task.cost = self.turn + 1, self.used + cost, cost
            self.changed.notify_all()
            return True
