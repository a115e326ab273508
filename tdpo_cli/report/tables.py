"""Tables of what a run folder records: its settings, its starts, every epoch's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.config import preset as presets
from tdpo_cli.config.preset import Preset
from tdpo_cli.report.charts import Rows
from tdpo_cli.report.html import escape, folded, table
from tdpo_cli.report.numbers import finite, short

MOST_ROWS = 1000


def settings(preset: Preset) -> str:
    """A folded table per section; what differs from the defaults is marked."""
    now, default = preset.as_dict(), Preset().as_dict()
    meanings = {key: doc for key, _, _, doc in presets.describe()}
    parts = []
    for name, keys in now.items():
        rows, changed = [], 0
        for key, value in keys.items():
            differs = value != default[name][key]
            changed += differs
            cells = [f"{escape(key)}<small>{escape(meanings[f'{name}.{key}'])}</small>", _setting(value), _setting(default[name][key])]
            rows.append([f"<mark>{cell}</mark>" if differs and i < 2 else cell for i, cell in enumerate(cells)])
        differ = f"{changed} differ{'s' if changed == 1 else ''}" if changed else "all default"
        parts.append(folded(f"{escape(name)} <small>{differ}</small>", table(("key", "value", "default"), rows, f"Settings: {name}", "settings")))
    return "".join(parts)


def _setting(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "<small>not set</small>" if value is None else f"<small>{'empty' if value == '' else 'none'}</small>"
    if isinstance(value, (list, dict)):
        value = ", ".join(map(str, value)) if isinstance(value, list) else ", ".join(f"{name} = {path}" for name, path in value.items())
    return escape(value if isinstance(value, str) else json.dumps(value))


def environment(entries: Sequence[Mapping[str, Any]]) -> str:
    """The content of env.json, one column per start."""
    if not entries:
        return "<p>env.json is not there.</p>"
    flat = [{**entry, **(entry.get("versions") or {})} for entry in entries]
    keys = [key for key in dict.fromkeys(key for entry in flat for key in entry) if key != "versions"]
    rows = [[escape(key), *(_setting(entry.get(key)) for entry in flat)] for key in keys]
    head = ["", *(f"start {i}" for i in range(1, len(flat) + 1))]
    device = entries[-1].get("device_name") or entries[-1].get("device", "")
    starts = f"{len(entries)} start{'s' if len(entries) > 1 else ''}"
    return folded(f"{escape(device)} <small>{starts}</small>", table(head, rows, "Environment", "settings"))


def numbers(rows: Rows) -> str:
    """All epochs as a table, for those who cannot see a chart or want the figure itself."""
    if not rows:
        return ""
    keys = [key for key in rows[0] if any(finite(row.get(key)) is not None for row in rows)]
    cells = [[short(finite(row.get(key)), 4) if key != "epoch" else f"{row[key]}" for key in keys] for row in rows[-MOST_ROWS:]]
    note = f"<p class=note>The last {MOST_ROWS:,} epochs; all are in metrics.jsonl.</p>" if len(rows) > MOST_ROWS else ""
    return folded(
        f"metrics.jsonl <small>{len(rows):,} epochs, {len(keys)} columns</small>", note + table(keys, cells, "All epochs"), kind="unprinted"
    )
