"""The prompt that a program left inside a PNG: plain text, AUTOMATIC1111's parameters, ComfyUI's workflow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tdpo_cli.storage.outside import is_text

CHUNKS = ("prompt", "parameters")
# where a workflow's nodes get what is painted, and where a node keeps its text; the more telling first
LINKS = ("positive", "guider", "conditioning", "conditioning_to", "conditioning_from", "conditioning_1", "conditioning_2")
TEXTS = ("text", "t5xxl", "text_g", "clip_g", "text_l", "clip_l", "prompt", "string", "value")
DEEPEST = 50  # nodes from the sampler to the text


def prompt_of(info: Mapping[str, Any]) -> str | None:
    """The positive prompt in the text chunks of a PNG; None if there is none, or if they do not say which it is."""
    found = (_positive(info[key]) for key in CHUNKS if is_text(info.get(key)))
    return next((prompt for prompt in found if prompt), None)


def _positive(text: str) -> str | None:
    if text.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(text)
        except RecursionError:
            return None
        except ValueError:  # a prompt that begins with a bracket, as AUTOMATIC1111's weights do
            return _before_settings(text)
        return _of_json(content) if isinstance(content, (dict, list)) else None
    return _before_settings(text)


def _before_settings(text: str) -> str:
    """AUTOMATIC1111: the prompt, then `Negative prompt: ...`, then `Steps: ..., Sampler: ...`, each from the start of a line."""
    return re.split(r"(?m)^(?:Negative prompt:|Steps: \d+,)", text, maxsplit=1)[0].strip()


def _of_json(content: Any) -> str | None:
    """A workflow's prompt, where its samplers agree on one."""
    if not isinstance(content, dict):
        return None
    own = content.get("sui_image_params")
    if isinstance(own, dict) and is_text(own.get("prompt")):  # SwarmUI
        return own["prompt"].strip()
    nodes = {key: node["inputs"] for key, node in content.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    samplers = [inputs for inputs in nodes.values() if _link(inputs.get("positive"), nodes) or _link(inputs.get("guider"), nodes)]
    found: set[str] = set()
    for inputs in samplers:
        _follow(inputs, nodes, found, set(), 0)
    return found.pop() if len(found) == 1 else None


def _link(value: Any, nodes: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The node that [id, output] names."""
    known = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))
    return nodes.get(str(value[0])) if known else None


def _follow(inputs: dict[str, Any], nodes: Mapping[str, dict[str, Any]], found: set[str], seen: set[int], depth: int) -> None:
    """Add the texts that lead into a node."""
    if depth > DEEPEST or id(inputs) in seen:
        return
    seen.add(id(inputs))
    onward = [node for name in LINKS if (node := _link(inputs.get(name), nodes)) is not None]
    if not onward:
        for name in TEXTS:
            if is_text(inputs.get(name)) and inputs[name].strip():
                found.add(inputs[name].strip())
                return
        onward = [node for name in TEXTS if (node := _link(inputs.get(name), nodes)) is not None][:1]
    for node in onward:
        _follow(node, nodes, found, seen, depth + 1)
