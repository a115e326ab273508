"""The product's own code reproduces every quantity that was recorded of the official code."""

import inspect

import pytest
import torch
from recording import Trace, TraceRandomness
from replay import Replay

from tdpo_cli.randomness import Randomness
from tdpo_cli.train import update as updates


def test_every_recorded_quantity_is_reproduced(replayed, capsys):
    worst = {}
    for comparison in replayed.comparisons:
        quantity = _quantity(comparison.name)
        error = comparison.error()
        if quantity not in worst or error / max(comparison.tolerance, 1e-12) > worst[quantity][2]:
            worst[quantity] = (error, comparison.tolerance, error / max(comparison.tolerance, 1e-12), comparison)
    with capsys.disabled():
        print(f"\n{replayed.trace.folder}: largest error of each quantity, its tolerance (* in units of the largest recorded value)")
        for quantity, (error, tolerance, _, comparison) in worst.items():
            star = "*" if comparison.relative else " "
            print(f"  {'ok ' if comparison.holds() else 'BAD'} {quantity:<42} {error:9.2e} {tolerance:9.1e}{star} at {comparison.name}")
        print(f"  {len(replayed.comparisons)} comparisons, {replayed.knife_edges} ratios on the clip range to within rounding")
    wrong = [f"{c.name}: {c.error():.2e} > {c.tolerance:.1e}" for c in replayed.comparisons if not c.holds()]
    assert not wrong, "\n".join(wrong)


def test_nothing_recorded_is_left_out(replayed, request):
    """A trace from elsewhere may hold quantities of another recorder: those are named, not passed over in silence."""
    skipped = getattr(replayed, "skipped", {})
    if replayed.unknown and request.config.getoption("--traces"):
        pytest.skip(f"not compared, unknown to this harness: {', '.join(sorted(replayed.unknown))}")
    assert not replayed.unknown
    if skipped:
        reasons = {reason: sorted(name for name, why in skipped.items() if why == reason) for reason in skipped.values()}
        pytest.skip("; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items()))


def test_a_change_of_one_percent_in_one_element_is_noticed(replayed):
    """Of every compared tensor: its largest element, and others far enough from zero that 1 % of them is not rounding."""
    generator = torch.Generator().manual_seed(0)
    unnoticed = []
    # a tensor may be compared twice, the second time more closely with recorded inputs
    closest = {}
    for comparison in sorted(replayed.comparisons, key=lambda c: -c.tolerance):
        closest[comparison.name] = comparison
    for comparison in closest.values():
        recorded = comparison.recorded
        if recorded.numel() == 0:
            continue
        flat = recorded.reshape(-1)
        whole = not recorded.is_floating_point()
        largest = int(flat.double().abs().argmax())
        for element in {largest, *_others(flat, comparison, generator)}:
            change = 1.0 if whole else 0.01 * flat[element].double().item()
            if whole and comparison.tolerance >= 1:  # 8-bit images, where one level is allowed: 1 % of the range
                change = 2.55
            if change == 0:  # a tensor of zeros has no 1 %
                change = 1e-3
            mutated = flat.double().clone()
            mutated[element] += change
            if comparison.holds(mutated.reshape(recorded.shape)):
                unnoticed.append(f"{comparison.name}[{element}] {flat[element].item():.3e}")
    assert not unnoticed, "\n".join(unnoticed)


@pytest.mark.slow
def test_masks_that_are_not_applied_are_noticed(dropout_folder, monkeypatch):
    monkeypatch.setattr(updates, "_keep_masks", lambda *arguments: None)
    wrong = {_quantity(comparison.name) for comparison in Replay(Trace(dropout_folder)).comparisons if not comparison.holds()}
    assert wrong >= {"mb/residual", "mb/cf_loss", "opt/critic_grad_probe", "opt/critic_probe"}
    assert not wrong & {"mb/log_prob", "mb/pg_loss", "opt/lora", "returns"}, "the made-up trace differs from the kept one in more than the critic"


@pytest.mark.parametrize("name", [name for name in vars(TraceRandomness) if not name.startswith("_")])
def test_a_trace_draws_through_the_products_methods(name):
    """Same arguments, same order: whatever the product passes to its own source of chance, a trace's takes too."""
    ours, theirs = (list(inspect.signature(getattr(class_, name)).parameters) for class_ in (TraceRandomness, Randomness))
    assert ours == theirs


def _others(flat, comparison, generator) -> list[int]:
    scale = flat.double().abs().max().item() if comparison.relative else 1.0
    far = (flat.double().abs() * 0.01 > 2 * comparison.tolerance * scale).nonzero().reshape(-1)
    picks = torch.randperm(len(far), generator=generator)[:3]
    return far[picks].tolist()


def _quantity(name: str) -> str:
    """The name without epoch, inner epoch, optimizer step and prompt."""
    parts = [part for part in name.split("/") if not (part[0] in "eiu" and part[1:].isdigit())]
    return "/".join(parts[:1] if parts[0] == "moments_after" else parts)
