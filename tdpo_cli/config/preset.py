"""Presets: found by name, read from sparse TOML or a run's preset.json, changed by --set, compared, written."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli.algorithms import ACTS_ON
from tdpo_cli.config.checks import check
from tdpo_cli.config.fields import SettingError, accepts_none, convert, named, said, suggest
from tdpo_cli.config.settings import SECTIONS, TABLES, Preset, Reward, hints_of

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the interpreter decides
    import tomli as tomllib


# --- finding and reading --------------------------------------------------------------------------------------------------
def folder() -> Path:
    """Where the shipped presets lie: inside the installed package, or at the top of a source tree."""
    package = Path(__file__).parent.parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.toml"))


def locate(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".toml", ".json"):
        if not path.is_file():
            raise SettingError(f"{path}: no such preset file.")
        return path
    if name_or_path in names():
        return folder() / f"{name_or_path}.toml"
    raise SettingError(f"unknown preset {named(name_or_path)!r}.{suggest(name_or_path, names())} `tdpo presets` lists them.")


def load(name_or_path: str, overrides: Sequence[tuple[str, Any]] = ()) -> Preset:
    """The preset of that name or file (.toml, or a run's preset.json), `("section.key", value)` overrides on top, checked. Raises SettingError."""
    path = locate(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML, JSON and UTF-8; nested beyond all limits
        raise SettingError(f"{path}: not a valid preset file: {error}") from None
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(table, dict):
        raise SettingError(f"{path}: expected sections, got {said(table)}.")
    preset = from_dict(table, where=path.name)
    preset = override(preset, overrides) if overrides else preset
    written = {key for key, _ in overrides}
    for key in without_effect(preset):
        if key in written:
            raise SettingError(f"--set: {key} acts on {', '.join(ACTS_ON[key])} and not on {preset.algorithm.name}. Leave it out.")
    return preset


def custom_rewards(name_or_path: str | None, overrides: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """The rewards that a command line names: by its overrides, and by its preset, unless that is a preset.json, which a run wrote."""
    named = [override for override in overrides if override[0] in ("reward.train", "reward.watch")]
    found = override(Preset(), named).rewards if named else ()
    if name_or_path is not None and Path(name_or_path).suffix != ".json":
        found += load(name_or_path).rewards
    return found


def without_effect(preset: Preset) -> list[str]:
    """The settings that are not at their default and that the preset's algorithm does not read."""
    changed = {key for key, _, _ in differences(Preset(), preset)}
    return [key for key, names in ACTS_ON.items() if preset.algorithm.name not in names and key in changed]


def from_dict(table: Mapping[str, Any], where: str) -> Preset:
    sections = {}
    for section, keys in table.items():
        if section not in SECTIONS:
            raise SettingError(f"{where}: unknown section [{named(section)}].{suggest(section, SECTIONS)}")
        if not isinstance(keys, Mapping):
            raise SettingError(f"{where}: [{section}] must be a table of keys, not {said(keys)}.")
        sections[section] = _section(section, keys, where)
    if "reward" in sections:
        sections["reward"] = _settled(sections["reward"], "train" in table["reward"], where)
    return check(Preset(**sections), where)


def _settled(reward: Reward, names_train: bool, where: str) -> Reward:
    """`train` is the first of `train_weights`; `watch` holds what `at_least` bounds and nothing that `train_weights` trains."""
    weights, train = reward.train_weights, reward.train
    if weights and names_train and train != next(iter(weights)):
        raise SettingError(
            f"{where}: reward.train is {train!r} and reward.train_weights begins with {next(iter(weights))!r}. Leave reward.train out, "
            "or train on one reward with reward.train_weights={}."
        )
    watch = [name for name in reward.watch if name not in weights]
    watch += [name for name in reward.at_least if name not in watch and name not in weights and name != train]
    return dataclasses.replace(reward, train=next(iter(weights), train), watch=tuple(watch))


def override(preset: Preset, overrides: Sequence[tuple[str, Any]], where: str = "--set") -> Preset:
    """A copy with `("section.key", value)` pairs applied and checked; `reward.TABLE.NAME` reaches into a table."""
    table = preset.as_dict()
    for key, value in overrides:
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            known = [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
            raise SettingError(f"{where}: unknown key {named(key)}.{suggest(key, known)}")
        name, _, entry = name.partition(".")
        if entry and section == "reward" and name in TABLES and isinstance(table[section][name], dict):
            table[section][name][entry] = value
        else:
            table[section][name + (f".{entry}" if entry else "")] = value
    if table["reward"]["train_weights"] and all(key != "reward.train" for key, _ in overrides):
        del table["reward"]["train"]  # it follows from the weights
    return from_dict(table, where)


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value`; the value is TOML, a bare word counts as a string, `none` as no value."""
    key, equals, raw = text.partition("=")
    if not equals:
        raise SettingError(f"--set {text}: expected section.key=value.")
    raw = raw.strip()
    if raw.lower() == "none":
        # "none" is also a choice of some keys; the type of the key decides
        return key.strip(), None if _is_optional(key.strip()) else "none"
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # no TOML, or a number or a nesting beyond all limits
        return key.strip(), raw


def differences(old: Preset, new: Preset) -> list[tuple[str, Any, Any]]:
    """(section.key, old value, new value) wherever two presets differ."""
    before, after = old.as_dict(), new.as_dict()
    return [
        (f"{section}.{key}", value, after[section][key])
        for section, keys in before.items()
        for key, value in keys.items()
        if value != after[section][key]
    ]


def as_toml(preset: Preset) -> str:
    """Every setting, as a preset file would say it; what is not set stands in a comment."""
    lines = []
    for section, keys in preset.as_dict().items():
        lines.append(f"[{section}]")
        for key, value in keys.items():
            if isinstance(value, dict):
                inner = ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items())
                lines.append(f"{key} = {{{inner}}}")
            else:
                lines.append(f"# {key}: not set" if value is None else f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """A value as TOML writes it: as JSON, but characters beyond 16 bits are not pairs, and what does not print is an escape."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def own_values(preset: Preset, recorded: Preset) -> Preset:
    """Settings that are left to the model's family, as a run has recorded them."""
    for section, keys in {"rollout": ("eta", "dynamics", "noise_level", "window"), "algorithm": ("critic_state",)}.items():
        asked, had = getattr(preset, section), getattr(recorded, section)
        own = {key: getattr(had, key) for key in keys if getattr(asked, key) is None}
        preset = dataclasses.replace(preset, **{section: dataclasses.replace(asked, **own)})
    return preset


def _section(section: str, keys: Mapping[str, Any], where: str) -> Any:
    cls = SECTIONS[section]
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in keys.items():
        if name not in fields:
            hint = suggest(name, fields, prefix=f"{section}.")
            raise SettingError(f"{where}: unknown key {section}.{named(name)}.{hint}")
        values[name] = convert(value, hints[name], fields[name].metadata, f"{where}: {section}.{name}")
    return cls(**values)


def _is_optional(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in SECTIONS and accepts_none(hints_of(SECTIONS[section]).get(name))
