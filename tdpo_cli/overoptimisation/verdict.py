"""From reward curves to plain words: did it get better, or did it cheat? Reads learned rewards only, never the truth.

The rule, on the epochs' mean rewards:

1. Every reward is put on one scale: its mean minus epoch 0's, in units of epoch 0's standard deviation. `others` is the mean of
   the watched learned rewards on that scale that are no constraint: what training optimises cannot judge it. Where several
   rewards train, the trained reward is their weighted mean on that scale.
2. Curves are averaged over WINDOW epochs. The noise of such an average is estimated from the curve itself: successive
   differences d have variance 2 s^2, the average of WINDOW epochs has the standard error s / sqrt(WINDOW).
3. The peak is where the averaged others are highest, `since` the epoch in the middle of that window. Compared with the newest
   window, which must not overlap it:
   - others below the peak by more than SIGMAS standard errors of the difference, the trained reward not lower: over-optimising;
   - both below by more than that: declining.
4. Failing these, `agreement` (how alike trained and watched rewards rank an epoch's samples of one prompt) averaged over the newest
   window below PARTED of its first window's: doubtful. The means still rise together, but the rewards no longer mean the same.
5. Failing that too: others not significantly below their peak, the trained reward above by more than that: stalled; else, or while
   the peak is still recent: improving if others are above their first window by more than that, else unclear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo_cli.config.settings import TRUE_REWARDS, Preset

WINDOW = 5  # epochs averaged
SIGMAS = 2.5  # standard errors of a difference that count: the peak is the highest of many windows, so two would cry wolf
PARTED = 0.8  # share of the first window's agreement


@dataclass(frozen=True)
class Verdict:
    """What curves, or a cross-evaluation, say."""

    kind: str  # "over-optimising", "declining", "doubtful", "stalled", "improving", "unclear", "too early", "unwatched" or "no verdict"
    sentence: str
    since: int | None = None  # epoch of the others' peak (over-optimising, declining, stalled), or where agreement fell (doubtful)
    trained: float | None = None  # change of the trained reward since then, or since the start, in sd of epoch 0
    others: float | None = None  # ... and of the mean of the watched learned rewards

    def as_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {"kind": self.kind, "sentence": self.sentence, "since": self.since}


def judges(rewards: Sequence[str], trained: str | None) -> list[str]:
    """The rewards that judge a model trained on `trained`: all but that one and the true ones, which are shown and read by no judgement."""
    return [name for name in rewards if name not in TRUE_REWARDS and name != trained]


def read(rows: Sequence[Mapping[str, Any]], preset: Preset) -> Verdict:
    """The verdict on a run's metrics rows, all of them, in order."""
    if not preset.judges:
        but = f" beside {_listed(list(preset.reward.at_least))}" if preset.reward.at_least else ""
        return Verdict("unwatched", f"no other learned reward is watched{but}: nothing to compare with (reward.watch)")
    trained, others = standardised(rows, [preset.trained]), standardised(rows, preset.judges)
    known = [i for i, pair in enumerate(zip(trained, others, strict=True)) if None not in pair]
    if len(known) < 2 * WINDOW:
        return Verdict("too early", f"too early to tell: {len(known)} of {2 * WINDOW} epochs")
    curves = [[curve[i] for i in known] for curve in (trained, others)]
    return _judge([rows[i]["epoch"] for i in known], *curves, parted(rows), preset)


def _judge(epochs: Sequence[int], trained: Sequence[float], others: Sequence[float], doubt: tuple[int, str] | None, preset: Preset) -> Verdict:
    name, watched = preset.trained_words, without(preset.reward.at_least)
    smooth_trained, smooth_others = averaged(trained), averaged(others)
    margin_trained, margin_others = margin(trained), margin(others)
    peak = max(range(len(smooth_others)), key=smooth_others.__getitem__)
    now = len(smooth_others) - 1
    if now - peak >= WINDOW:
        since = epochs[peak + WINDOW // 2]
        gained, lost = smooth_trained[now] - smooth_trained[peak], smooth_others[peak] - smooth_others[now]
        kind = None
        if lost > margin_others:
            kind = "over-optimising" if gained >= 0 else "declining" if gained < -margin_trained else None
        elif gained > margin_trained and not doubt:
            kind = "stalled"
        if kind:
            sentence = f"{name} {gained:+.2f} sd, {watched} {-lost:+.2f} sd since epoch {since}: {kind}"
            return Verdict(kind, sentence, since, gained, -lost)
    gained, others_gained = smooth_trained[now] - smooth_trained[0], smooth_others[now] - smooth_others[0]
    changes = f"{name} {gained:+.2f} sd, {watched} {others_gained:+.2f} sd since the start"
    if doubt:
        since, words = doubt
        return Verdict("doubtful", f"{changes}, but {words}: doubtful", since, gained, others_gained)
    kind = "improving" if others_gained > margin_others else "unclear"
    return Verdict(kind, f"{changes}: {kind}", None, gained, others_gained)


def without(constraints: Iterable[str]) -> str:
    """What judges, in words: `others`, or `others without a, which constrains,`."""
    names = list(constraints)
    return f"others without {_listed(names)}" if names else "others"


def _listed(names: Sequence[str]) -> str:
    """a and b, which constrain,"""
    return f"{' and '.join(names)}, which constrain{'s' if len(names) == 1 else ''},"


def parted(rows: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """Where the averaged agreement fell below PARTED of its first window's, if it is below now; and that in words."""
    known = [(row["epoch"], row["agreement"]) for row in rows if row.get("agreement") is not None]
    if len(known) < 2 * WINDOW:
        return None
    smooth = averaged([agreement for _, agreement in known])
    if smooth[0] <= 0 or smooth[-1] >= PARTED * smooth[0]:
        return None
    first = next(i for i in range(len(smooth)) if all(value < PARTED * smooth[0] for value in smooth[i:]))
    epoch = known[first + WINDOW // 2][0]
    return epoch, f"they agree less ({smooth[0]:.2f} -> {smooth[-1]:.2f}, below {PARTED:.0%} since epoch {epoch})"


def should_stop(rows: Sequence[Mapping[str, Any]], preset: Preset) -> bool:
    """Whether the verdict was `over-optimising` after each of the last `run.stop_on_overoptimisation` epochs."""
    patience = preset.run.stop_on_overoptimisation
    if patience is None or len(rows) < patience:
        return False
    return all(read(rows[: len(rows) - back], preset).kind == "over-optimising" for back in range(patience))


def best(rows: Sequence[Mapping[str, Any]], preset: Preset, saved: Sequence[int]) -> int | None:
    """Of the epochs `saved`, the one around which the watched learned rewards are highest; None where none is watched."""
    others = dict(zip((row["epoch"] for row in rows), standardised(rows, preset.judges), strict=True)) if preset.judges else {}
    reach = WINDOW // 2

    def around(epoch: int) -> float:
        near = [others[e] for e in range(epoch - reach, epoch + reach + 1) if others.get(e) is not None]
        return sum(near) / len(near) if near else -math.inf

    candidates = [epoch for epoch in saved if around(epoch) > -math.inf]
    return max(candidates, key=around, default=None)


# --- curves -----------------------------------------------------------------------------------------------------------------
def standardised(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[float | None]:
    """Per epoch the mean over `names` of (mean - epoch 0's mean) / epoch 0's std; None where one is missing."""
    if not rows:
        return []
    start = [(rows[0].get(f"rewards/{name}/mean"), rows[0].get(f"rewards/{name}/std")) for name in names]
    if any(mean is None or not std for mean, std in start):
        return [None] * len(rows)
    curve: list[float | None] = []
    for row in rows:
        means = [row.get(f"rewards/{name}/mean") for name in names]
        scaled = [(mean - first) / std for mean, (first, std) in zip(means, start, strict=True) if mean is not None]
        curve.append(sum(scaled) / len(names) if len(scaled) == len(names) else None)
    return curve


def averaged(curve: Sequence[float]) -> list[float]:
    """Means of WINDOW successive values: entry i is of i .. i+WINDOW-1."""
    return [sum(curve[i : i + WINDOW]) / WINDOW for i in range(len(curve) - WINDOW + 1)]


def noise(curve: Sequence[float]) -> float:
    """Standard deviation of one value around a slowly changing curve, from successive differences (von Neumann 1941)."""
    steps = [(after - before) ** 2 for before, after in zip(curve, curve[1:])]  # noqa: B905 - one shorter on purpose
    return math.sqrt(sum(steps) / len(steps) / 2)


def margin(curve: Sequence[float]) -> float:
    """How far two of the curve's averages must lie apart to count as different."""
    return SIGMAS * noise(curve) * math.sqrt(2 / WINDOW)


def rise(rows: Sequence[Mapping[str, Any]], reward: str) -> float | None:
    """Mean of the last fifth of the epochs minus mean of the first fifth, in units of epoch 0's standard deviation."""
    means = [row[f"rewards/{reward}/mean"] for row in rows]
    std = rows[0][f"rewards/{reward}/std"] if rows else None
    if not std or len(rows) < 2 or any(mean is None for mean in means):
        return None
    fifth = max(1, len(means) // 5)
    return (sum(means[-fifth:]) - sum(means[:fifth])) / fifth / std
