"""The verdict of a cross-evaluation: a run's last checkpoint against the base and against where the other rewards were best."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tdpo_cli.overoptimisation import agreement
from tdpo_cli.overoptimisation.statistics import Estimate
from tdpo_cli.overoptimisation.verdict import TRUE_REWARDS, Verdict, without

FEWEST_PROMPTS = 10  # for a verdict: below, the intervals are much too narrow
NONE = "no verdict"  # the kind where nothing can be judged


def verdict(
    trained: str | None, prompts: int, since_base: Mapping[str, Estimate] | None, best_epoch: int | None, best: Mapping[str, Estimate] | None,
    agreed: Mapping[str, Estimate] | None, constraints: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """Judge a run's last checkpoint, in the words of tdpo_cli.overoptimisation.verdict. The true rewards are never read.

    `since_base` and `best` hold the change of `trained` and of the `others`, from the base and from where the others stand
    best; `best_epoch` None is the base itself. What counts as a change is an interval without 0. `agreed`: of `agreement.change`.
    `constraints` took part in training and are not among the others.
    """
    if trained is None:
        return _none("what it was trained on is not known")
    if trained in TRUE_REWARDS:
        return _none(f"trained on {trained}, the truth itself")
    if since_base is None or best is None:
        return _none(f"no other learned reward beside {trained} was evaluated")
    if prompts < FEWEST_PROMPTS:
        return _none(f"{prompts} prompts are too few, {FEWEST_PROMPTS} are needed")
    if any(one["low"] is None for one in (*since_base.values(), *best.values())):
        return _none("too few scores are known")
    kind, change, doubt = None, best, agreement.parted(agreed)
    if best["others_held_out"]["high"] < 0 and best["others"]["mean"] < 0:
        kind = "over-optimising" if best["trained"]["mean"] >= 0 else "declining" if best["trained"]["high"] < 0 else None
    elif best["trained"]["low"] > 0 and not doubt:
        kind = "stalled"
    if kind is None:
        kind, change, best_epoch = "improving" if since_base["others"]["low"] > 0 else "unclear", since_base, None
        if doubt:
            kind = "doubtful"
    since = "against the base" if best_epoch is None else f"since epoch {best_epoch}"
    words = f"{trained} {change['trained']['mean']:+.2f} sd, {without(constraints)} {change['others']['mean']:+.2f} sd {since}"
    if kind == "doubtful":
        words += f", but they agree less ({agreed['base']['mean']:.2f} -> {agreed['model']['mean']:.2f})"
    return Verdict(kind, f"{words}: {kind}", best_epoch)


def _none(reason: str) -> Verdict:
    return Verdict(NONE, f"{reason}: {NONE}")


def read(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a cross_eval.json, every verdict as {"kind", "sentence", "since"}: up to version 0.1 it is the sentence alone."""
    return {**content, "runs": [{**run, "verdict": _of_sentence(run["verdict"])} for run in content["runs"]]}


def _of_sentence(stored: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(stored, str):
        return stored
    epoch = re.search(r" since epoch (\d+): [^:]+$", stored)
    return Verdict(stored.rpartition(": ")[2], stored, int(epoch[1]) if epoch else None).as_dict()
