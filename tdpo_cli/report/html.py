"""The skeleton of a page: escaping, stylesheet and script inlined, tables, and writing it whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli import __version__
from tdpo_cli.errors import RequestError
from tdpo_cli.storage import disk


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    # a lone surrogate, as from a file name that is not UTF-8, could not be written
    return html.escape(str(text), quote=True).encode("utf-8", "replace").decode()


def data(value: Any, kind: str) -> str:
    """A block of JSON that the page's script reads; no text in it can end the block."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def page(title: str, body: str) -> str:
    """A whole document. It asks for nothing: its policy allows its own script, inline styles and embedded images alone."""
    style, script = _inline("page.css"), _inline("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="tdpo {escape(__version__)}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def section(title: str, body: str, lead: str = "") -> str:
    """A titled part of the page; `lead` is a sentence of text, not HTML. Nothing for an empty body."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=lead>{escape(lead)}</p>' if lead else ''}\n{body}\n</section>\n"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Small labelled values in a row that wraps."""
    return "<dl class=facts>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs) + "</dl>"


def table(head: Sequence[object], rows: Iterable[Sequence[str]], label: str, kind: str = "") -> str:
    """Cells are HTML, heads are text. The first column names the row. Wide tables scroll inside their own box."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(_cell(cell, first=i == 0) for i, cell in enumerate(row)) + "</tr>\n" for row in rows)
    name = escape(label)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="{kind}"><caption class="unseen">{name}</caption>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def folded(summary: str, body: str, opened: bool = False, kind: str = "") -> str:
    """A part that opens with a click; `summary` is HTML."""
    return f'<details class="{kind}"{" open" if opened else ""}><summary>{summary}</summary>\n{body}\n</details>\n'


def save(text: str, file: Path) -> None:
    """Write the page, whole or not at all. Raises RequestError where nothing can be written, WorkError if the disk fails."""
    if file.is_dir():
        raise RequestError(f"{file}: is a folder; expected the name of a file to write, such as {file / 'report.html'}.")
    disk.make(file.parent)
    disk.write_text(file, text, shared=True)


def _cell(cell: str, first: bool) -> str:
    return f'<th scope="row">{cell}</th>' if first else f"<td>{cell}</td>"


def _inline(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
