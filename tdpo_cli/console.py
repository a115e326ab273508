"""What a person sees: headers, progress bars, one line per epoch. Plain lines when not on a terminal, silent when asked."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from tdpo_cli.errors import without_password

LONGEST_LINE = 2000  # characters of a line that a message shows
# what changes a terminal or hides text: control characters but newline and tab, marks that change the direction of writing, half characters
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that cannot act on a terminal: control characters as escapes, as \\x1b, and long lines cut with what was left out. No password either."""
    lines = without_password(text).split("\n")
    for number, line in enumerate(lines):
        if len(line) > LONGEST_LINE:
            lines[number] = f"{line[:LONGEST_LINE]} ... ({len(line) - LONGEST_LINE:,} more characters)"
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode(), "\n".join(lines))


class Console:
    """`quiet` says nothing but warnings, `silent` not even those; everything said also goes to `log` once it is set."""

    def __init__(self, quiet: bool = False, silent: bool = False):
        self.quiet, self.silent = quiet or silent, silent
        # messages for people go to standard error: standard output belongs to --json and to pipes
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.log: Path | None = None

    def say(self, text: str = "", style: str | None = None) -> None:
        text = printable(text)
        if not self.quiet:
            self.rich.print(text, style=style, markup=False, emoji=False)
        self._note(text)

    def warn(self, text: str) -> None:
        text = printable(text)
        if not self.silent:
            self.rich.print(f"warning: {text}", style="yellow", markup=False, emoji=False)
        self._note(f"warning: {text}")

    def pairs(self, rows: Sequence[tuple[str, str]], title: str | None = None) -> None:
        """A two-column block: what, and its value."""
        if title:
            self.say(title, style="bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.say(f"  {name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        # as Text: names may hold what rich would read as markup
        shown = lambda value: Text(printable(str(value)))
        table = Table(title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.title = None if title is None else shown(title)
        for column in columns:
            table.add_column(shown(column))
        for row in rows:
            table.add_row(*map(shown, row))
        if not self.quiet:
            self.rich.print(table)
        buffer = io.StringIO()
        RichConsole(file=buffer, width=160).print(table)
        self._note(buffer.getvalue().rstrip())

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Give `advance(n)` for the work's duration: a bar with the time left on a terminal, plain lines elsewhere.

        A plain line says that the work begins; later ones, once a minute, say the share done and the time left.
        """
        if self.quiet:
            yield lambda n=1: None
            return
        if not self.rich.is_terminal:
            yield PlainProgress(what, total, self.say).advance
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # here: a tenth of the time of --help

        bar = Progress(
            TextColumn(f"{what:<22}", markup=False), BarColumn(bar_width=32), MofNCompleteColumn(), TextColumn("time left"),
            TimeRemainingColumn(compact=True), console=self.rich, transient=True,
        )  # fmt: skip
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda n=1: bar.advance(task, n)

    def working(self, what: str) -> contextlib.AbstractContextManager:
        """A sign of life on a terminal while something takes a few seconds; it leaves no trace."""
        return contextlib.nullcontext() if self.quiet or not self.rich.is_terminal else self.rich.status(f"{what} ...")

    @contextlib.contextmanager
    def timed(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Add the time of a block to seconds[name]."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def _note(self, text: str) -> None:
        if self.log is not None:
            # a full disk: what was said is on screen, and saving the epoch will say what is wrong
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                file.write(text + "\n")


class PlainProgress:
    """Progress for log files: one line at the start, then one line whenever SECONDS have passed since the last."""

    SECONDS = 60.0

    def __init__(self, what: str, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.what, self.total, self.say, self.clock = what, total, say, clock
        self.done = 0
        self.began = self.said = clock()
        say(what)

    def advance(self, n: int = 1) -> None:
        """Count n more units as done."""
        self.done += n
        now = self.clock()
        if now - self.said >= self.SECONDS and self.total and self.done:
            self.said = now
            left = (now - self.began) * max(0, self.total - self.done) / self.done
            self.say(f"{self.what}, {100 * self.done // self.total}% done, about {duration(left)} left")


def significant(value: float | None, digits: int = 3) -> str:
    """A number for people: 0.512, 1.3e-05, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def size(count: float) -> str:
    """12.3 MB, 4.0 GB (decimal)"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
