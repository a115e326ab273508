"""Facts about the flow-matching transition: diffusers' step without noise, the published formulas with it."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tdpo_cli.errors import RequestError
from tdpo_cli.models.samplers.flow import DYNAMICS, Flow, noise_levels

STATIC = {"num_train_timesteps": 1000, "shift": 3.0}  # Stable Diffusion 3.5
DYNAMIC = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHEDULES = {
    "static": (STATIC, {}),
    "dynamic": (DYNAMIC, {"mu": 0.63, "unshifted": [1.0, 0.8, 0.6, 0.4, 0.2]}),
    "terminal": ({**DYNAMIC, "shift_terminal": 0.02}, {"mu": 0.8, "unshifted": [1.0, 0.8, 0.6, 0.4, 0.2]}),
    "karras": ({**STATIC, "use_karras_sigmas": True}, {}),
}


def normal(seed, shape=(2, 4, 6, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_scheduler(config, steps, mu=None, unshifted=None):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps, mu=mu, sigmas=unshifted)
    return scheduler


def step(sampler, k, velocity, x):
    return sampler.step(velocity, x, torch.full((len(x),), k))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigmas_are_diffusers_own(schedule):
    config, options = SCHEDULES[schedule]
    sampler, scheduler = Flow.of(config, [0.7] * 4 + [0.0], **options), their_scheduler(config, 5, **options)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert torch.equal(sampler.sigma, scheduler.sigmas[:-1]) and torch.equal(sampler.sigma_next, scheduler.sigmas[1:])


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_without_noise_is_diffusers_step(schedule, dynamics):
    config, options = SCHEDULES[schedule]
    sampler, scheduler = Flow.of(config, [0.0] * 5, dynamics, **options), their_scheduler(config, 5, **options)
    for k in range(5):
        velocity, x = normal(k), normal(10 + k)
        ours = step(sampler, k, velocity, x)
        theirs = scheduler.step(velocity, scheduler.timesteps[k], x).prev_sample
        assert ours.std.abs().max() == 0
        assert torch.allclose(ours.mean, theirs, rtol=0, atol=2e-6), k


def test_the_smallest_sigma_is_shifted_twice():
    """3 * 0.001 / (1 + 2 * 0.001), and once more: what the published folders give, whatever the number of steps."""
    once = 3 * 0.001 / (1 + 2 * 0.001)
    for steps in (2, 10, 40):
        assert Flow.of(STATIC, [0.0] * steps).sigma[-1].item() == pytest.approx(3 * once / (1 + 2 * once), abs=1e-7)


# SD 3.5 medium at 10 steps, from the published formulas by hand
SIGMA = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
STD = {
    ("flow-sde", 0.7): [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063],
    ("cps", 0.8): [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085, 0],
    ("dance-sde", 0.3): [0.060, 0.065, 0.071, 0.078, 0.086, 0.097, 0.111, 0.130, 0.156, 0.028],
}
NOISE_LEFT = {
    "flow-sde": [1.001, 0.971, 0.882, 0.809, 0.725, 0.624, 0.496, 0.341, 0.240, 0.007],
    "cps": [0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0],
}


@pytest.mark.parametrize(("dynamics", "level"), STD)
def test_std_of_every_step(dynamics, level):
    sampler = Flow.of(STATIC, [level] * 10, dynamics)
    assert sampler.sigma.tolist() == pytest.approx(SIGMA, abs=5.1e-5)
    assert sampler.std.tolist() == pytest.approx(STD[dynamics, level], abs=5.1e-4)


@pytest.mark.parametrize("dynamics", NOISE_LEFT)
def test_noise_left_in_the_state(dynamics):
    """With a perfect velocity, measured on many draws: flow-sde leaves more noise than the network is told, cps exactly that."""
    sampler = Flow.of(STATIC, [0.7 if dynamics == "flow-sde" else 0.8] * 10, dynamics)
    shape = (1, 100_000)
    image, noise = torch.full(shape, 0.5), normal(0, shape)
    for k, expected in enumerate(NOISE_LEFT[dynamics]):
        sigma = sampler.sigma[k]
        x = (1 - sigma) * image + sigma * noise
        x_next = step(sampler, k, noise - image, x).sample(normal(100 + k, shape))
        left = x_next - (1 - sampler.sigma_next[k]) * image
        assert left.mean().item() == pytest.approx(0, abs=0.02)
        # the draws' own error is 0.2 % of the value
        assert left.std().item() == pytest.approx(expected, abs=6e-4 + 0.01 * expected), k


@pytest.mark.parametrize("k", range(10))
def test_flow_sde_is_the_published_step(k):
    """Flow-GRPO's formula in x and v, term by term."""
    sampler = Flow.of(STATIC, [0.7] * 10, "flow-sde")
    sigmas = their_scheduler(STATIC, 10).sigmas.double()
    sigma, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
    s = 0.7 * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))).sqrt()
    velocity, x = normal(1), normal(2)
    mean = x.double() * (1 + s**2 * dt / (2 * sigma)) + velocity.double() * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    ours = step(sampler, k, velocity, x)
    assert torch.allclose(ours.mean.double(), mean, rtol=0, atol=2e-6)
    assert ours.std.flatten().tolist() == pytest.approx([(s * (-dt).sqrt()).item()] * 2, rel=1e-6)
    assert sampler.diffusion[k].item() == pytest.approx(s.item(), rel=1e-6)
    assert torch.allclose(ours.x0, x - sigma.float() * velocity)


def test_dance_sde_is_the_published_step():
    sampler = Flow.of(STATIC, [0.3] * 10, "dance-sde")
    sigmas = their_scheduler(STATIC, 10).sigmas.double()
    for k in range(10):
        sigma, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        velocity, x = normal(1).double(), normal(2).double()
        score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
        mean = x + velocity * dt - 0.5 * 0.3**2 * score * dt
        assert torch.allclose(step(sampler, k, velocity.float(), x.float()).mean.double(), mean, rtol=0, atol=5e-6), k


def test_cps_by_hand():
    sampler = Flow.of(STATIC, [0.5] * 3, "cps")
    sigma, after = sampler.sigma[1].item(), sampler.sigma_next[1].item()
    transition = step(sampler, 1, torch.full((1, 2), 0.4), torch.full((1, 2), 0.3))
    x0, eps = 0.3 - sigma * 0.4, 0.3 + (1 - sigma) * 0.4
    std = after * math.sin(math.pi / 4)
    assert transition.std.item() == pytest.approx(std, rel=1e-6)
    assert transition.mean[0, 0].item() == pytest.approx((1 - after) * x0 + math.sqrt(after**2 - std**2) * eps, abs=1e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_gradient_flows_through_the_mean_only(dynamics):
    sampler = Flow.of(STATIC, noise_levels(4, 0.7, None), dynamics)
    velocity, x = normal(1).requires_grad_(), normal(2)
    transition = step(sampler, 1, velocity, x)
    x_next = transition.sample(normal(3))
    transition.log_prob(x_next).sum().backward()
    # d/dv of -(x' - mean)^2 / (2 std^2), x' constant, mean over elements; mean = ... + v dmean
    c, sigma, after = sampler.coefficient[1], sampler.sigma[1], sampler.sigma_next[1]
    slope = -(1 - after) * sigma + c * (1 - sigma)
    expected = (x_next - transition.mean).detach() * slope / sampler.std[1] ** 2 / x[0].numel()
    assert torch.allclose(velocity.grad, expected, rtol=1e-4, atol=1e-9)
    assert not transition.std.requires_grad


def test_rows_may_be_at_different_steps():
    sampler = Flow.of(STATIC, [0.7] * 4)
    velocity, x = normal(1), normal(2)
    both = sampler.step(velocity, x, torch.tensor([3, 0]))
    for row, k in ((0, 3), (1, 0)):
        alone = step(sampler, k, velocity[row : row + 1], x[row : row + 1])
        assert torch.equal(both.mean[row : row + 1], alone.mean) and torch.equal(both.std[row : row + 1], alone.std)


def test_half_precision_inputs_are_computed_in_fp32():
    sampler = Flow.of(STATIC, [0.7] * 4)
    velocity, x = normal(1).bfloat16(), normal(2)
    transition = step(sampler, 1, velocity, x)
    assert transition.mean.dtype == torch.float32
    assert torch.equal(transition.mean, step(sampler, 1, velocity.float(), x).mean)


# --- which steps have noise, and which are trained ----------------------------------------------------------------------------
def test_all_steps_but_the_last_have_noise_by_default():
    assert noise_levels(4, 0.7, None) == [0.7, 0.7, 0.7, 0.0]
    assert Flow.of(STATIC, noise_levels(4, 0.7, None)).stochastic.tolist() == [True, True, True, False]


def test_inside_a_window_only():
    assert noise_levels(5, 0.7, (1, 2)) == [0.0, 0.7, 0.7, 0.0, 0.0]
    assert noise_levels(3, 0.7, (0, 3)) == [0.7] * 3
    for window in ((0, 6), (4, 2), (-1, 2), (2, 0)):
        with pytest.raises(RequestError, match="does not fit into 5 denoising steps"):
            noise_levels(5, 0.7, window)


def test_cps_leaves_out_the_steps_near_the_end_unless_a_window_has_them():
    levels = noise_levels(10, 0.8, None)
    sampler = Flow.of(STATIC, levels, "cps")
    assert sampler.stochastic.tolist() == [True] * 8 + [False] * 2
    assert sampler.std[8] > 0  # noise there all the same
    assert Flow.of(STATIC, noise_levels(10, 0.8, (7, 2)), "cps", (7, 2)).stochastic.nonzero().flatten().tolist() == [7, 8]
    assert Flow.of(STATIC, levels, "flow-sde").stochastic.tolist() == [True] * 9 + [False]


def test_steps_that_cannot_be_trained_are_refused():
    Flow.of(STATIC, noise_levels(4, 0.7, None)).check_trainable()
    with pytest.raises(RequestError, match="none of the 4 denoising steps can be trained"):
        Flow.of(STATIC, [0.0] * 4).check_trainable()
    with pytest.raises(RequestError, match="none of the 2 denoising steps .* below 0.05"):
        Flow.of(STATIC, [0.8, 0.0], "cps").check_trainable()
    with pytest.raises(RequestError, match=r"must follow each other, and these do not: \[0, 2\]"):
        Flow.of(STATIC, [0.7, 0.0, 0.7, 0.0]).check_trainable()


def test_a_schedule_that_does_not_fall_is_refused():
    with pytest.raises(RequestError, match="sigmas must fall"):
        Flow.of({**STATIC, "invert_sigmas": True}, [0.7] * 4)
    with pytest.raises(RequestError, match="`mu` must be passed"):
        Flow.of(DYNAMIC, [0.7] * 4)


def test_the_table_in_the_docs_is_the_scripts(request, monkeypatch):
    root = request.config.rootpath
    monkeypatch.syspath_prepend(root / "benchmarks")
    import flow_noise

    assert flow_noise.table() in (root / "docs/flow.md").read_text()
