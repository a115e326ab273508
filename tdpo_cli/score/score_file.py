"""The file of scores, one row an image, written as they come and continued where it stopped; and its NAME.meta.json."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.storage import claims, disk, outside

Row = dict[str, Any]  # image, prompt, then a number or None per reward
SUFFIXES = (".jsonl", ".csv")


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--out {path}: expected a file that ends in .jsonl or .csv.")


class ScoreFile:
    """Rows of `columns` in a .jsonl or .csv file, in the order of `names`. Use `taken` to write one."""

    def __init__(self, path: Path, columns: Sequence[str], lock: IO[bytes] | None = None):
        """lock: the file as it was when this process took it."""
        check_suffix(path)
        self.path, self.columns, self.lock = path, list(columns), lock
        self.meta_path = path.with_suffix(".meta.json")

    @classmethod
    @contextlib.contextmanager
    def taken(cls, path: Path | None, name: str, columns: Sequence[str]) -> Iterator[ScoreFile]:
        """A file of this process alone: `path`, or a new scores/NAME-0001.jsonl. An error that leaves it empty removes it again.

        Raises RequestError, also where another process has it.
        """
        with claims.made(Path("scores") if path is None else path.parent):
            if path is None:
                path, lock = claims.new_file(Path("scores"), name, ".jsonl", "writing")
            else:
                check_suffix(path)
                lock = claims.own_file(path, "writing")
            with lock:
                try:
                    yield cls(path, columns, lock)
                except BaseException:
                    if not os.fstat(lock.fileno()).st_size:
                        with contextlib.suppress(OSError):
                            path.unlink()  # still locked, so nobody else has begun it
                    raise

    def begin(self, meta: Mapping[str, Any], names: Sequence[str], multiple_of: int) -> int:
        """Make ready to append: a new file, or the whole rows of one made with the same settings. -> rows already there

        What is kept is a multiple of `multiple_of` rows unless all are there. Raises RequestError, WorkError.
        """
        with disk.failures(self.path):
            if self.path.exists() and self.path.stat().st_size:
                return self._continue(meta, names, multiple_of)
            self._check_sister(meta)
            disk.write_text(self.meta_path, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
            self.path.write_text(self._header(), encoding="utf-8")
            return 0

    def append(self, rows: Sequence[Row]) -> None:
        """Raises WorkError, also where the file was removed or replaced: the rows before these would be missing."""
        if self.lock is not None and not disk.is_open_as(self.lock, self.path):
            raise WorkError(f"{self.path}: the file was removed, moved or replaced while it was written. The same command starts anew.")
        with disk.failures(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write("".join(map(self._line, rows)))

    def read(self) -> Iterator[Row]:
        """Every whole row; a torn last line is left out. Raises RequestError on anything else that is not a row."""
        for row, _ in self._read():
            yield row

    # --- continuing -----------------------------------------------------------------------------------------------------
    def _continue(self, meta: Mapping[str, Any], names: Sequence[str], multiple_of: int) -> int:
        recorded = self._read_meta()
        if recorded is None:
            raise RequestError(
                f"{self.path} exists, but {self.meta_path.name} beside it, which says how it was made, does not (or is damaged). "
                "Choose another --out or remove the file."
            )
        different = differences(recorded, meta)
        if different:
            raise RequestError(
                f"{self.path} was made with other settings and cannot be continued:\n"
                + "\n".join(f"  {line}" for line in different)
                + "\nChoose another --out or remove the file."
            )
        ends = [len(self._header().encode())]
        for row, end in self._read():
            position = len(ends) - 1
            if position == len(names) or row["image"] != names[position]:
                raise RequestError(f"{self.path}, row {position + 1}: {row['image']!r} is not the image expected there. Choose another --out.")
            ends.append(end)
        kept = len(ends) - 1
        if kept < len(names):
            kept -= kept % multiple_of
        os.truncate(self.path, ends[kept])
        if kept == 0:
            self.path.write_text(self._header(), encoding="utf-8")
        return kept

    def _read_meta(self) -> dict[str, Any] | None:
        """None where it is missing or not what this program writes."""
        try:
            content = json.loads(outside.read_text(self.meta_path))
        except (OSError, ValueError, RecursionError):  # RequestError is a ValueError
            return None
        described = content.get("rewards") if isinstance(content, dict) else None
        whole = isinstance(described, dict) and all(isinstance(one, dict) and isinstance(one.get("sha256", {}), dict) for one in described.values())
        return content if whole else None

    def _check_sister(self, meta: Mapping[str, Any]) -> None:
        """Raises RequestError where NAME.meta.json belongs to a file of the other suffix that was made with other settings."""
        sisters = [sister for suffix in SUFFIXES if (sister := self.path.with_suffix(suffix)) != self.path and sister.exists()]
        recorded = self._read_meta() if sisters else None
        if recorded is not None and (different := differences(recorded, meta)):
            raise RequestError(
                f"{self.meta_path} belongs to {sisters[0]}, which was made with other settings ({different[0]}). Choose another --out."
            )

    def _read(self) -> Iterator[tuple[Row, int]]:
        """(row, the byte where it ends)"""
        try:
            file = outside.open_regular(self.path)
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be read: {error.strerror or error}.") from None
        with file:
            parse = self._read_csv if self.path.suffix == ".csv" else self._read_jsonl
            yield from parse(file)

    def _read_jsonl(self, file: io.BufferedReader) -> Iterator[tuple[Row, int]]:
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or list(row) != ["image", "prompt", *self.columns]:
                    raise ValueError("other columns")
                yield self._checked(row), end
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{self.path}, line {number}: not a row of scores ({first_line(error)}).") from None

    def _read_csv(self, file: io.BufferedReader) -> Iterator[tuple[Row, int]]:
        end, whole = 0, True

        def lines() -> Iterator[str]:
            nonlocal end, whole
            for line in file:
                end, whole = end + len(line), line.endswith(b"\n")
                yield line.decode(errors="replace")  # a torn line may end within a letter

        names = ["image", "prompt", *self.columns]
        reader, number = csv.reader(lines()), -1
        try:
            for number, cells in enumerate(reader):
                if not whole or (len(cells) < len(names) and not file.peek(1)):
                    return  # torn, also within the line breaks of a prompt
                if len(cells) != len(names) or (number == 0 and cells != names):
                    raise ValueError("other columns")
                if number:
                    scores = [float(cell) if cell else None for cell in cells[2:]]
                    yield self._checked(dict(zip(names, [cells[0], cells[1], *scores], strict=True))), end
        except (ValueError, csv.Error) as error:
            raise RequestError(f"{self.path}, row {number}: not a row of scores ({first_line(error)}).") from None

    @staticmethod
    def _checked(row: Row) -> Row:
        """Raises ValueError for what is not a name, prompt or finite number."""
        image, prompt, *scores = row.values()
        if not outside.is_text(image) or not (prompt is None or outside.is_text(prompt)):
            raise ValueError("the image or the prompt is not text")
        for score in scores:
            if score is not None and (type(score) not in (int, float) or not abs(score) <= sys.float_info.max):
                raise ValueError("a score is not a finite number")
        return row

    # --- writing --------------------------------------------------------------------------------------------------------
    def _header(self) -> str:
        return self._csv(["image", "prompt", *self.columns]) if self.path.suffix == ".csv" else ""

    def _line(self, row: Row) -> str:
        if self.path.suffix == ".csv":
            return self._csv(["" if value is None else value for value in row.values()])
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def _csv(cells: Sequence[Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # so that cells with either of the two are quoted
        return buffer.getvalue().removesuffix("\r\n") + "\n"


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What would make rows of the two not comparable: images and prompts, rewards, weights, variant, preprocessing."""
    lines = []
    for key in ("images", "list_sha256", "dtype"):
        if recorded.get(key) != wanted[key]:
            what = "the images or their prompts have changed" if key == "list_sha256" else f"{key}: {recorded.get(key)}, now {wanted[key]}"
            lines.append(what)
    old, new = recorded.get("rewards", {}), wanted["rewards"]
    if list(old) != list(new):
        return [*lines, f"rewards: {', '.join(old)}, now {', '.join(new)}"]
    for name in new:
        for key in ("variant", "preprocessing"):
            if old[name].get(key) != new[name][key]:
                lines.append(f"{name}: {key}: {json.dumps(old[name].get(key))}, now {json.dumps(new[name][key])}")
        if sorted(map(str, old[name].get("sha256", {}).values())) != sorted(new[name]["sha256"].values()):
            lines.append(f"{name}: other weights ({old[name].get('checkpoint')}, now {new[name]['checkpoint']})")
    return lines
