"""`tdpo presets`: what can be run, and every setting."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options


def list_or_show(
    name: Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="Show this preset, every setting resolved.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its default and meaning.")] = False,
    json_: options.JsonFlag = False,
) -> None:
    """List the presets, or show one."""
    from tdpo_cli.config import preset as presets
    from tdpo_cli.config.settings import describe

    if keys:
        rows = [{"key": key, "type": kind, "default": default, "meaning": doc} for key, kind, default, doc in describe()]
        if json_:
            return print(json.dumps(rows))
        width = max(len(row["key"]) for row in rows)
        for row in rows:
            print(f"{row['key']:<{width}}  {row['meaning']} [{row['type']}; default {json.dumps(row['default'])}]")
    elif name:
        resolved = presets.load(name)
        if json_:
            return print(json.dumps(resolved.as_dict()))
        print(presets.as_toml(resolved), end="")
    else:
        listed = {known: presets.load(known) for known in presets.names()}
        if json_:
            return print(json.dumps({known: preset.as_dict() for known, preset in listed.items()}))
        for known, preset in listed.items():
            print(f"{known:<12}  {preset.algorithm.name} on {preset.trained_words}, {preset.model.base}, {preset.run.epochs} epochs")
