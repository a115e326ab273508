"""Facts about the DDIM transition: it is diffusers' step, with a density."""

import pytest
import torch
from diffusers import DDIMScheduler

from tdpo_cli.errors import RequestError
from tdpo_cli.models.samplers.ddim import DDIM
from tdpo_cli.types import Transition

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "timestep_spacing": "leading",
}  # fmt: skip


def config(**changes):
    return {**STABLE_DIFFUSION, **changes}


def normal(seed, shape=(2, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs(settings, steps, k, prediction, x_t, noise, eta):
    scheduler = DDIMScheduler.from_config(settings)
    scheduler.set_timesteps(steps)
    return scheduler.step(prediction, scheduler.timesteps[k], x_t, eta=eta, variance_noise=noise).prev_sample


def ours(settings, steps, k, prediction, x_t, noise, eta):
    schedule = DDIM.of(settings, steps, eta)
    return schedule.step(prediction, x_t, torch.full((len(x_t),), k)).sample(noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        {"timestep_spacing": "trailing", "steps_offset": 0},
        {"beta_schedule": "linear", "num_train_timesteps": 200},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "plain",
)
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_a_step_is_diffusers_step(prediction_type, changes, eta):
    settings = config(prediction_type=prediction_type, **changes)
    for k in range(5):
        args = settings, 5, k, normal(k), normal(10 + k), normal(20 + k), eta
        # v at pure noise: x0 is a difference of numbers a hundred times larger
        assert ours(*args).allclose(theirs(*args), rtol=1e-5, atol=1e-5), k


def test_thresholding_wins_over_clipping_as_in_diffusers():
    settings = config(clip_sample=True, clip_sample_range=0.1, thresholding=True, sample_max_value=2.0)
    args = settings, 5, 2, normal(0), 3 * normal(1), normal(2), 1.0
    assert ours(*args).allclose(theirs(*args), atol=1e-5)


def test_thresholding_is_per_image():
    settings = config(thresholding=True, sample_max_value=5.0)
    schedule = DDIM.of(settings, 5, 1.0)
    prediction, x_t, k = normal(0), torch.cat([normal(1)[:1], 9 * normal(1)[1:]]), torch.tensor([2, 2])
    both = schedule.step(prediction, x_t, k).mean
    alone = schedule.step(prediction[:1], x_t[:1], k[:1]).mean
    assert both[:1].allclose(alone, atol=1e-6)


def test_absent_clip_sample_means_true():
    settings = config()
    del settings["clip_sample"]
    args = 5, 0, normal(0), normal(1), normal(2), 1.0
    assert ours(settings, *args).equal(ours(config(clip_sample=True), *args))
    assert not ours(settings, *args).allclose(ours(config(clip_sample=False), *args), atol=1e-2)


def test_set_alpha_to_one_has_no_effect():
    args = 5, 4, normal(0), normal(1), normal(2), 1.0
    assert ours(config(set_alpha_to_one=True), *args).equal(ours(config(set_alpha_to_one=False), *args))
    # it would have one in diffusers
    assert not theirs(config(set_alpha_to_one=True), *args).equal(theirs(config(set_alpha_to_one=False), *args))


def test_the_schedule_by_hand():
    settings = config(num_train_timesteps=4, trained_betas=[0.5, 0.5, 0.5, 0.5], steps_offset=1)
    schedule = DDIM.of(settings, 2, eta=0.5)
    # leading: (2, 0) + 1; two timesteps back, clamped at 0; cumulative alphas 1/2, 1/4, 1/8, 1/16
    assert schedule.timesteps.tolist() == [3, 1]
    assert schedule.abar.tolist() == [1 / 16, 1 / 4]
    assert schedule.abar_prev.tolist() == [1 / 4, 1 / 2]
    variances = [(3 / 4) / (15 / 16) * (1 - 1 / 4), (1 / 2) / (3 / 4) * (1 - 1 / 2)]
    assert schedule.std.tolist() == pytest.approx([0.5 * variance**0.5 for variance in variances])


def test_another_schedulers_config_is_read_as_ddims():
    pndm = {**config(), "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert DDIM.of(pndm, 50, 1.0).timesteps[:3].tolist() == [981, 961, 941]


def test_steps_may_differ_within_a_batch():
    schedule = DDIM.of(config(), 5, 1.0)
    prediction, x_t = normal(0), normal(1)
    mixed = schedule.step(prediction, x_t, torch.tensor([3, 1]))
    for row, k in enumerate((3, 1)):
        alone = schedule.step(prediction[row : row + 1], x_t[row : row + 1], torch.tensor([k]))
        assert mixed.mean[row : row + 1].equal(alone.mean) and mixed.std[row].equal(alone.std[0])


def test_half_precision_predictions_are_stepped_in_single():
    transition = DDIM.of(config(), 5, 1.0).step(normal(0).half(), normal(1), torch.tensor([0, 0]))
    assert transition.mean.dtype == transition.std.dtype == torch.float32


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(RequestError, match="prediction_type is 'flow'; supported: epsilon, sample, v_prediction"):
        DDIM.of(config(prediction_type="flow"), 5, 1.0)


# --- density ----------------------------------------------------------------------------------------------------------
def test_log_prob_is_the_mean_of_the_normal_log_density():
    transition = Transition(mean=normal(0), std=torch.tensor([0.3, 2.0]).view(2, 1, 1, 1), x0=normal(0))
    x = normal(1)
    expected = torch.distributions.Normal(transition.mean, transition.std).log_prob(x).mean(dim=(1, 2, 3))
    assert transition.log_prob(x).allclose(expected, atol=1e-6)


def test_the_gradient_goes_through_the_mean_and_not_through_the_sample():
    mean, x = normal(0).requires_grad_(), normal(1).requires_grad_()
    Transition(mean, torch.full((2, 1, 1, 1), 0.5), mean).log_prob(x).sum().backward()
    # d/dmu = (x - mu) / sigma^2 / elements
    assert mean.grad.allclose((x - mean).detach() / 0.25 / mean[0].numel(), atol=1e-7)
    assert x.grad is None


def test_the_densest_point_is_the_mean():
    transition = Transition(mean=normal(0), std=torch.ones(2, 1, 1, 1), x0=normal(0))
    assert (transition.log_prob(transition.mean) > transition.log_prob(transition.mean + 0.1)).all()
