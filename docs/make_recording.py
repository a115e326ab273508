"""Write docs/quickstart.svg, the recording of a terminal, from the log of a run: `python docs/make_recording.py runs/quickstart-0001`.

    tdpo train --preset quickstart --out runs/quickstart-0001

makes the run. Lines appear in the order of the run, its time shortened; where a picture cannot move, all of them show.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich import terminal_theme
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

WIDTH = 80  # columns
SHOWN = 3  # epochs shown at the start and at the end
LASTS = 12  # seconds of the recording
BOLD = ("$ ", "tdpo ", "done: ", "verdict: ")


def lines(run: Path) -> list[tuple[str, float]]:
    """(line, seconds of the run at which it appears) of the log: header, the first and last epochs, verdict."""
    seconds = [json.loads(row)["seconds/total"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    shown, now, left_out = [("$ tdpo train --preset quickstart", 0.0)], 1.0, False
    for line in (run / "log.txt").read_text().splitlines():
        epoch = re.match(r" *(\d+)/\d+ ", line)
        if line.startswith("where things are"):
            break
        if re.match(r"epoch \d+: ", line):  # a plain progress line
            continue
        if epoch:
            now += seconds[int(epoch[1])]
            if int(epoch[1]) == SHOWN:
                shown.append(("...", now))
            left_out = SHOWN <= int(epoch[1]) < len(seconds) - SHOWN
        if left_out:  # an epoch, or what was said after it
            continue
        shown.append((line, now))
    return shown[:-1] if shown[-1][0] == "" else shown


def svg(said: list[tuple[str, float]]) -> str:
    """The recording. Nothing is loaded from elsewhere: the font is the reader's own."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line, _ in said:
        console.print(Text(line, style="bold" if line.startswith(BOLD) else "", no_wrap=True, overflow="crop"))
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace("Fira Code", "ui-monospace, DejaVu Sans Mono")
    drawn = console.export_svg(title="tdpo", theme=terminal_theme.DIMMED_MONOKAI, code_format=form, unique_id="recording")
    place = lambda number: f' style="animation-delay:{LASTS * said[number][1] / said[-1][1]:.1f}s"' if number < len(said) else ""
    drawn = re.sub(r'(<text class="recording-r\d+")([^>]*clip-path="url\(#recording-line-(\d+)\)")', lambda m: m[1] + place(int(m[3])) + m[2], drawn)
    motion = "@keyframes appear { from { opacity: 0 } } @media (prefers-reduced-motion: no-preference) { text[style] { animation: appear 1ms both } }"
    return drawn.replace("</style>", f"{motion}\n    </style>", 1)


if __name__ == "__main__":
    Path(__file__).with_name("quickstart.svg").write_text(svg(lines(Path(sys.argv[1]))))
