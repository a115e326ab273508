"""Facts about the KL penalty and its controller."""

import math

import pytest
import torch

from tdpo_cli.algorithms import kl

# log p, log p_ref -> penalty, by hand. d = log p - log p_ref is 0.5, -0.5, 0
TABLE = {
    "kl": [0.5, -0.5, 0],
    "abs": [0.5, 0.5, 0],
    "square": [0.125, 0.125, 0],
    "clip": [0.5, 0, 0],
    "approx": [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5, 0],
    # m = (e^p + e^q)/2; only the larger of the two stands above ln m: (0.5 - ln((e^0.5 + 1)/2)) / 2
    "js": [(0.5 - math.log((math.exp(0.5) + 1) / 2)) / 2] * 2 + [0],
}
LOG_PROBS = torch.tensor([[-1.0, -1.5, -2.0]], dtype=torch.float64)
REF_LOG_PROBS = torch.tensor([[-1.5, -1.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("mode", TABLE)
def test_penalty_by_hand(mode):
    assert kl.penalty(mode, LOG_PROBS, REF_LOG_PROBS)[0].tolist() == pytest.approx(TABLE[mode], abs=1e-12)


def test_the_table_holds_every_mode():
    assert set(TABLE) == set(kl.PENALTIES)


def test_every_mode_of_the_preset_exists_and_no_other():
    from tdpo_cli.config.settings import describe

    kinds = next(kind for key, kind, _, _ in describe() if key == "algorithm.kl_penalty")
    assert set(kinds.split(" | ")) == set(kl.PENALTIES)


def test_an_unknown_mode_is_an_error():
    with pytest.raises(KeyError):
        kl.penalty("klx", LOG_PROBS, REF_LOG_PROBS)


@pytest.mark.parametrize("mode", ["abs", "square", "js"])
def test_symmetric_modes_do_not_care_which_policy_is_which(mode):
    p, q = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)).double()
    assert kl.penalty(mode, p, q).allclose(kl.penalty(mode, q, p), atol=1e-15)


@pytest.mark.parametrize("mode", ["abs", "square", "clip", "approx", "js"])
def test_all_but_the_plain_mode_are_never_negative(mode):
    p, q = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(1)).double()
    assert (kl.penalty(mode, p, q) >= 0).all()


def test_js_of_very_unlikely_samples_stays_finite():
    far = torch.tensor([[-2000.0]])
    assert kl.penalty("js", far, far + 1).isfinite().all()


def test_mean_kl_sums_over_steps_and_averages_over_samples():
    p = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    q = torch.tensor([[0.5, 1.0], [1.0, 1.0]])
    assert kl.mean_kl(p, q) == pytest.approx(((0.5 + 1.0) + (-1.0 - 2.0)) / 2)


# --- controller -------------------------------------------------------------------------------------------------------
def test_without_a_target_beta_is_fixed():
    controller = kl.controller(0.3, None, 2000)
    controller.update(1e6, 256)
    assert controller.beta == 0.3


@pytest.mark.parametrize(
    "mean_kl, error",
    [(6.6, 0.1), (5.4, -0.1), (6.0, 0.0), (60.0, 0.2), (0.0, -0.2), (-50.0, -0.2), (7.2, 0.2)],
)
def test_adaptive_beta_moves_by_the_clipped_relative_error(mean_kl, error):
    controller = kl.controller(0.5, 6.0, 2000)
    controller.update(mean_kl, 256)
    assert controller.beta == pytest.approx(0.5 * (1 + error * 256 / 2000), rel=1e-12)


def test_adaptive_beta_compounds():
    controller = kl.controller(1.0, 1.0, 100)
    controller.update(5.0, 50)
    controller.update(5.0, 50)
    assert controller.beta == pytest.approx(1.1**2)


def test_beta_survives_a_round_trip():
    before, after = kl.controller(0.5, 6.0, 2000), kl.controller(0.5, 6.0, 2000)
    before.update(60.0, 256)
    after.load_state_dict(before.state_dict())
    assert after.beta == before.beta != 0.5
