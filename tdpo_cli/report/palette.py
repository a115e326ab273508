"""How rewards and verdicts look on every page: a colour each, the truth dashed, a mood for the box of a verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tdpo_cli.report.charts import OTHERS

TRUE_REWARD = "gold"  # the sandbox's: it is shown, and judges nothing
TRUE_NOTE = "true reward, never read by the verdict"


def looks(rewards: Sequence[str], trained: str | None) -> dict[str, str]:
    """Reward, or the curve `trained` of several -> class of page.css, the same in every chart of a page."""
    others = [name for name in rewards if name not in (trained, TRUE_REWARD)]
    known = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {TRUE_REWARD: "gold", trained: "trained"}
    return {name: known[name] for name in (*rewards, *([] if trained is None or trained in rewards else [trained]))}


def role(name: str, trained: Collection[str], constraints: Collection[str] = ()) -> str:
    """What stands behind a reward's name in a legend."""
    notes = {"trained": name in trained, "constraint, not read by the verdict": name in constraints, TRUE_NOTE: name == TRUE_REWARD}
    return ", ".join(note for note, holds in notes.items() if holds)


def training(run: Mapping[str, Any]) -> tuple[Collection[str], Collection[str]]:
    """(rewards that trained, constraints) of a run of a cross-evaluation."""
    return run.get("trained_weights") or [run["trained_reward"]], run.get("constraints", [])


def mood(kind: str) -> str:
    """Kind of a verdict -> class of page.css."""
    return {"over-optimising": "bad", "declining": "bad", "doubtful": "early", "stalled": "early", "improving": "good"}.get(kind, "")
