"""Ctrl-C and SIGTERM at the right moment: at once while an epoch is computed, after the writing once it is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that arrives in the block is delivered when the block is done; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    arrived: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            restore()
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if arrived:
        signal.raise_signal(arrived[0])
