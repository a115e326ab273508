"""The table that a run prints while it trains: one line per epoch, at most 80 columns wide.

epoch  the epoch, counted from 0, of the run's last
NAME   mean of the trained reward, on its own scale
rise   its change since epoch 0, in standard deviations of epoch 0
NAME   the same change for each watched reward; one column `others`, their mean, where they do not fit
kl     approximate KL divergence between the policies before and after the update
clip   share of the probability ratios that were clipped
time   seconds of the epoch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.config.settings import Preset
from tdpo_cli.console import significant
from tdpo_cli.overoptimisation.verdict import standardised

WIDTH = 80
GAP = " "
MEANING = "rise and watched rewards: in sd since epoch 0; kl, clip: size of the update"

Cells = list[tuple[str, str]]  # (heading, value), by column


def heading(preset: Preset) -> list[str]:
    """The lines above the table: what the columns mean, and their names."""
    return [MEANING, _joined([(name, name) for name, _ in _cells(preset, _blank(preset), _blank(preset))], preset)]


def line(row: Mapping[str, Any], first: Mapping[str, Any], preset: Preset) -> str:
    """One epoch. `first` is the row of epoch 0. Resets and skipped steps follow on a line of their own."""
    text = _joined(_cells(preset, row, first), preset)
    notes = []
    if row.get("reset"):
        notes.append(f"reset {row['reset']} neurons, {100 * (row.get('dormant_fraction') or 0):.0f}% dormant")
    if row.get("skipped_steps"):
        notes.append(f"skipped {row['skipped_steps']} of {preset.updates_per_epoch} optimizer steps")
    if preset.reward.at_least:
        held = (f"{name} {row.get(f'constraints/{name}/multiplier') or 0:.2f}" for name in preset.reward.at_least)
        notes.append(f"multiplier of {', '.join(held)}")
    return "\n".join([text, *(f"{'':7}{note}" for note in notes)])


def _cells(preset: Preset, row: Mapping[str, Any], first: Mapping[str, Any]) -> Cells:
    trained = preset.trained
    mean, spent = row[f"rewards/{trained}/mean"], row["seconds/total"]
    before: Cells = [
        ("epoch", f"{row['epoch']}/{preset.run.epochs - 1}"),
        (trained, "-" if mean is None else f"{mean:.3f}"),
        ("rise", _rise(row, first, [trained])),
    ]
    after: Cells = [
        ("kl", significant(row["approx_kl"], 1)),
        ("clip", "-" if row["policy_clip_fraction"] is None else f"{100 * row['policy_clip_fraction']:.0f}%"),
        ("time", _clock(spent)),
    ]
    watched: Cells = [(name, _rise(row, first, [name])) for name in preset.reward.watch]
    wide = sum(_width(name, preset) + len(GAP) for name, _ in (*before, *watched, *after)) - len(GAP)
    if wide > WIDTH and len(watched) > 1:
        watched = [("others", _rise(row, first, preset.judges))]
    return [*before, *watched, *after]


def _rise(row: Mapping[str, Any], first: Mapping[str, Any], names: Sequence[str]) -> str:
    change = standardised([first, row], names)[-1] if names else None
    return "-" if change is None else f"{change:+.2f}"


def _clock(seconds: float) -> str:
    """12.3s, 4m05s, 2h10m"""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _width(name: str, preset: Preset) -> int:
    longest = {"epoch": 2 * len(str(preset.run.epochs)) + 1, "kl": 6, "clip": 4, "time": 6, "rise": 5}
    return max(len(name), longest.get(name, 5))


def _joined(cells: Cells, preset: Preset) -> str:
    return GAP.join(f"{value:>{_width(name, preset)}}" for name, value in cells)


def _blank(preset: Preset) -> dict[str, Any]:
    """A row without values, from which the headings follow."""
    blank: dict[str, Any] = {f"rewards/{name}/{what}": None for name in (preset.trained, *preset.rewards) for what in ("mean", "std")}
    return blank | {"epoch": 0, "approx_kl": None, "policy_clip_fraction": None, "seconds/total": 0.0}
