"""Facts about the verdict of a cross-evaluation, and how it is stored."""

import pytest

from tdpo_cli.overoptimisation import held_out
from tdpo_cli.overoptimisation.verdict import Verdict


def change(trained, others, held_out=None):
    """Estimates as since_best gives them: (mean, half width) each."""
    band = lambda mean, half: {"mean": mean, "low": mean - half, "high": mean + half}
    return {"trained": band(*trained), "others": band(*others), "others_held_out": band(*(held_out or others))}


@pytest.mark.parametrize(
    "since_base, best_epoch, best, ending",
    [
        (change((2, 0.1), (0.4, 0.1)), 14, change((1.1, 0.1), (-0.3, 0.1)), "aesthetic +1.10 sd, others -0.30 sd since epoch 14: over-optimising"),
        (change((2, 0.1), (-0.3, 0.1)), None, change((2, 0.1), (-0.3, 0.1)), "aesthetic +2.00 sd, others -0.30 sd against the base: over-optimising"),
        (change((1, 0.1), (0.4, 0.1)), 14, change((-0.5, 0.1), (-0.3, 0.1)), "aesthetic -0.50 sd, others -0.30 sd since epoch 14: declining"),
        (change((2, 0.1), (0.4, 0.1)), 14, change((0.5, 0.1), (-0.1, 0.2)), "aesthetic +0.50 sd, others -0.10 sd since epoch 14: stalled"),
        (change((2, 0.1), (0.4, 0.1)), 59, change((0, 0), (0, 0)), "aesthetic +2.00 sd, others +0.40 sd against the base: improving"),
        (change((2, 0.1), (0.1, 0.2)), 59, change((0, 0), (0, 0)), "aesthetic +2.00 sd, others +0.10 sd against the base: unclear"),
        # the fall is luck: not there on the held-out halves
        (change((2, 0.1), (0.4, 0.1)), 14, change((0.1, 0.2), (-0.3, 0.1), (-0.1, 0.2)), "against the base: improving"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_intervals_say(since_base, best_epoch, best, ending):
    assert held_out.verdict("aesthetic", 48, since_base, best_epoch, best, None).sentence.endswith(ending)


PARTED = {
    "base": {"mean": 0.8, "low": 0.7, "high": 0.9},
    "model": {"mean": 0.5, "low": 0.3, "high": 0.6}, "change": {"mean": -0.3, "low": -0.4, "high": -0.2},
}  # fmt: skip


@pytest.mark.parametrize(
    "best, ending",
    [
        (change((0, 0), (0, 0)), "aesthetic +2.00 sd, others +0.40 sd against the base, but they agree less (0.80 -> 0.50): doubtful"),
        (change((0.5, 0.1), (-0.1, 0.2)), "against the base, but they agree less (0.80 -> 0.50): doubtful"),  # else: stalled
        (change((1.1, 0.1), (-0.3, 0.1)), "aesthetic +1.10 sd, others -0.30 sd since epoch 14: over-optimising"),  # the plainer sign
    ],
)
def test_a_rise_under_rewards_that_part_is_doubtful(best, ending):
    since_base = change((2, 0.1), (0.4, 0.1))
    assert held_out.verdict("aesthetic", 48, since_base, 14, best, PARTED).sentence.endswith(ending)
    assert held_out.verdict("aesthetic", 48, since_base, 14, best, {**PARTED, "change": {"mean": -0.3, "low": -0.7, "high": 0.1}}).kind != "doubtful"


@pytest.mark.parametrize(
    "trained, prompts, known, reason",
    [
        (None, 48, True, "what it was trained on is not known"),
        ("gold", 48, True, "trained on gold, the truth itself"),
        ("aesthetic", 48, False, "no other learned reward beside aesthetic was evaluated"),
        ("aesthetic", held_out.FEWEST_PROMPTS - 1, True, "9 prompts are too few, 10 are needed"),
    ],
)
def test_where_nothing_can_be_judged_the_verdict_says_why(trained, prompts, known, reason):
    numbers = change((2, 0.1), (0.4, 0.1)) if known else None
    assert held_out.verdict(trained, prompts, numbers, None, numbers, None) == Verdict("no verdict", f"{reason}: no verdict")


def test_a_reward_without_known_scores_is_no_verdict():
    unknown = {name: {"mean": None, "low": None, "high": None} for name in ("trained", "others", "others_held_out")}
    assert held_out.verdict("aesthetic", 48, unknown, None, unknown, None).sentence == "too few scores are known: no verdict"


# --- as it is stored ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "numbers",
    [
        (change((2, 0.1), (0.4, 0.1)), 14, change((1.1, 0.1), (-0.3, 0.1)), None),
        (change((2, 0.1), (-0.3, 0.1)), None, change((2, 0.1), (-0.3, 0.1)), None),
        (change((2, 0.1), (0.4, 0.1)), 14, change((0.5, 0.1), (-0.1, 0.2)), None),
        (change((2, 0.1), (0.4, 0.1)), 14, change((0, 0), (0, 0)), PARTED),
        (None, None, None, None),
    ],
)
def test_a_sentence_of_an_earlier_version_reads_as_the_same_verdict(numbers):
    stored = held_out.verdict("rewards/mine.py:score", 48, *numbers).as_dict()
    old, new = ({"seed": 3, "runs": [{"run": "one", "verdict": verdict}]} for verdict in (stored["sentence"], stored))
    assert held_out.read(old) == held_out.read(new) == new


@pytest.mark.parametrize(
    "best_epoch, best, kind, since",
    [
        (14, change((1.1, 0.1), (-0.3, 0.1)), "over-optimising", 14),
        (None, change((1.1, 0.1), (-0.3, 0.1)), "over-optimising", None),  # since the base
        (14, change((0, 0), (0, 0)), "improving", None),  # against the base
    ],
)
def test_a_verdict_names_the_epoch_it_counts_from(best_epoch, best, kind, since):
    verdict = held_out.verdict("aesthetic", 48, change((2, 0.1), (0.4, 0.1)), best_epoch, best, None)
    assert (verdict.kind, verdict.since) == (kind, since)
