"""Pages: their templates, the data that their script reads, and writing a file whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tdpo_cli import __version__
from tdpo_cli.errors import RequestError
from tdpo_cli.report import numbers
from tdpo_cli.storage import disk

# read at once: a program that is replaced while a run of days goes on ends it with the templates that it began with
TEMPLATES = {file.name: file.read_text(encoding="utf-8") for file in Path(__file__).with_name("templates").iterdir() if file.is_file()}


def data(value: Any, kind: str) -> Markup:
    """A block of JSON that the page's script reads; no text in it can end the block."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" class="{kind}">{text}</script>')


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.DictLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_ENVIRONMENT.globals |= {"data": data, "version": __version__}
_ENVIRONMENT.filters |= {"signed": numbers.signed}


def part(name: str, *values: Any) -> Markup:
    """One macro of parts.html."""
    return getattr(_ENVIRONMENT.get_template("parts.html").module, name)(*values)


def page(template: str, title: str, **values: Any) -> str:
    """A whole document. It asks for nothing: its policy allows its own script, inline styles and embedded images alone."""
    style, script = TEMPLATES["page.css"], TEMPLATES["page.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    csp = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return _ENVIRONMENT.get_template(template).render(title=title, style=Markup(style), script=Markup(script), csp=csp, **values)


def save(text: str, file: Path) -> None:
    """Write the page, whole or not at all. Raises RequestError where nothing can be written, WorkError if the disk fails."""
    if file.is_dir():
        raise RequestError(f"{file}: is a folder; expected the name of a file to write, such as {file / 'report.html'}.")
    disk.make(file.parent)
    # a lone surrogate, as from a file name that is not UTF-8, could not be written
    disk.write_text(file, text.encode("utf-8", "replace").decode(), shared=True)
