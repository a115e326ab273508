"""The file of scores, one row an image, written as they come and continued where it stopped; and its NAME.meta.json."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.errors import RequestError
from tdpo_cli.storage import disk

Row = dict[str, Any]  # image, prompt, then a number or None per reward
SUFFIXES = (".jsonl", ".csv")


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--out {path}: expected a file that ends in .jsonl or .csv.")


class ScoreFile:
    """Rows of `columns` in a .jsonl or .csv file, in the order of `names`."""

    def __init__(self, path: Path, columns: Sequence[str]):
        check_suffix(path)
        self.path, self.columns = path, list(columns)
        self.meta_path = path.with_suffix(".meta.json")

    def check_writable(self) -> None:
        """Before the networks are loaded. Raises RequestError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                if self.path.exists():
                    open(self.path, "r+b").close()
        except OSError as error:
            raise RequestError(f"--out {self.path}: cannot be written: {error.strerror or error}.") from None

    def begin(self, meta: Mapping[str, Any], names: Sequence[str], multiple_of: int) -> int:
        """Make ready to append: a new file, or the whole rows of one made with the same settings. -> rows already there

        What is kept is a multiple of `multiple_of` rows unless all are there. Raises RequestError, WorkError.
        """
        with disk.failures(self.path):
            if self.path.exists() and self.path.stat().st_size:
                return self._continue(meta, names, multiple_of)
            disk.write_text(self.meta_path, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
            self.path.write_text(self._header(), encoding="utf-8")
            return 0

    def append(self, rows: Sequence[Row]) -> None:
        """Raises WorkError."""
        with disk.failures(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write("".join(map(self._line, rows)))

    def read(self) -> Iterator[Row]:
        """Every whole row; a torn last line is left out. Raises RequestError on anything else that is not a row."""
        for row, _ in self._read():
            yield row

    # --- continuing -----------------------------------------------------------------------------------------------------
    def _continue(self, meta: Mapping[str, Any], names: Sequence[str], multiple_of: int) -> int:
        try:
            recorded = json.loads(self.meta_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise RequestError(
                f"{self.path} exists, but {self.meta_path.name} beside it, which says how it was made, does not (or is damaged). "
                "Choose another --out or remove the file."
            ) from None
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

    def _read(self) -> Iterator[tuple[Row, int]]:
        """(row, the byte where it ends)"""
        with open(self.path, "rb") as file:
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
                if list(row) != ["image", "prompt", *self.columns]:
                    raise ValueError("other columns")
            except (ValueError, TypeError) as error:
                raise RequestError(f"{self.path}, line {number}: not a row of scores ({error}).") from None
            yield row, end

    def _read_csv(self, file: io.BufferedReader) -> Iterator[tuple[Row, int]]:
        end, whole = 0, True

        def lines() -> Iterator[str]:
            nonlocal end, whole
            for line in file:
                end, whole = end + len(line), line.endswith(b"\n")
                yield line.decode(errors="replace")  # a torn line may end within a letter

        names = ["image", "prompt", *self.columns]
        for number, cells in enumerate(csv.reader(lines())):
            if not whole or (len(cells) < len(names) and not file.peek(1)):
                return  # torn, also within the line breaks of a prompt
            try:
                if len(cells) != len(names) or (number == 0 and cells != names):
                    raise ValueError("other columns")
                if number:
                    scores = [float(cell) if cell else None for cell in cells[2:]]
                    yield dict(zip(names, [cells[0], cells[1], *scores], strict=True)), end
            except ValueError as error:
                raise RequestError(f"{self.path}, row {number}: not a row of scores ({error}).") from None

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
        csv.writer(buffer, lineterminator="\n").writerow(cells)
        return buffer.getvalue()


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
        if sorted(old[name].get("sha256", {}).values()) != sorted(new[name]["sha256"].values()):
            lines.append(f"{name}: other weights ({old[name].get('checkpoint')}, now {new[name]['checkpoint']})")
    return lines
