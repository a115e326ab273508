"""Facts about one inner epoch of optimizer steps."""

import dataclasses
import math

import pytest
import torch
from helpers import LinearPolicy, make_preset, make_trajectory
from tolerances import EPS, same_output

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.errors import WorkError
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.world import World
from tdpo_cli.randomness import Randomness, unshuffled
from tdpo_cli.train.losses import approx_kl, critic_loss, policy_loss
from tdpo_cli.train.messages import drift_line
from tdpo_cli.train.metrics import per_step, summarise
from tdpo_cli.train.state import make_optimizers
from tdpo_cli.train.update import Learner, Observer
from tdpo_cli.types import Credit

ROUNDING = 16 * EPS  # of two log-probs of the linear policy: a few operations on numbers of size 1 to 4


# --- the pass -----------------------------------------------------------------------------------------------------------
class Setup:
    """6 samples of 3 steps, credit from seeded numbers, everything an update needs."""

    def __init__(self, micro_batch=64, samples=6, **settings):
        settings = {
            "rollout__samples_per_epoch": samples, "rollout__steps": 3, "update__batch_size": 3, "rollout__guidance_scale": 1.0,
            "update__clip_range": 0.1, "update__learning_rate": 1e-2, "update__critic_learning_rate": 1e-2,
            "algorithm__critic_init_std": 0.1, **settings,
        }  # fmt: skip
        self.preset = make_preset(**settings)
        self.micro_batch = micro_batch
        self.policy = LinearPolicy(steps=3)
        self.everyone = make_trajectory(self.policy, samples)
        self.policy.calls.clear()
        self.critic = Critic(5, 0.1) if self.preset.has_critic else None
        if self.critic:
            self.critic.initialise(torch.Generator().manual_seed(0))
        self.optimizers = make_optimizers(self.policy, self.critic, self.preset)
        advantages, returns = torch.randn(2, samples, 3, generator=torch.Generator().manual_seed(5)).double()
        self.credit = Credit(advantages, returns, returns[:, 0], None)
        self.plan = unshuffled(samples, 3).first_columns(self.preset.trained_steps)

    def run(self, observer=None):
        learner = Learner(self.policy, self.critic, self.optimizers, self.preset, Randomness(3), Plan.of(self.micro_batch), World())
        return learner.inner_epoch(self.everyone, self.credit, self.plan, 0, observer or Observer())

    @property
    def weights(self):
        networks = [self.policy.weight, self.policy.bias, *(self.critic.parameters() if self.critic else [])]
        return torch.cat([weight.detach().flatten() for weight in networks]).clone()


def test_ratio_drift_is_zero_at_the_first_step_and_not_later():
    steps = Setup().run()
    assert steps[0].policy.log_ratios.abs().max() <= ROUNDING
    # the second slot is scored under moved weights
    assert steps[-1].policy.log_ratios.abs().max() > 1e-4
    assert summarise(steps, World())["ratio_drift"] <= ROUNDING


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_any_micro_batch_gives_the_same_weights(micro_batch):
    reference, other = Setup(micro_batch=3), Setup(micro_batch=micro_batch)
    start = reference.weights
    reference.run()
    other.run()
    assert max(other.policy.calls) == min(micro_batch, 3)
    assert (reference.weights - start).abs().max() > 1e-2
    assert other.weights.allclose(reference.weights, rtol=0, atol=1e-6)


def test_the_gradient_is_of_the_mean_over_the_effective_batch():
    setup, seen = Setup(micro_batch=2, algorithm__name="ddpo"), []

    class Watch(Observer):
        def gradients(self, index):
            seen.append(setup.policy.bias.grad.item())

    everyone, rows = setup.everyone, torch.arange(3)
    transition = setup.policy.transition(everyone.latents[rows, 0], torch.zeros(3, dtype=torch.int64), everyone.texts, everyone.text_rows[rows], 1.0)
    ratio = (transition.log_prob(everyone.latents[rows, 1]) - everyone.log_probs[rows, 0]).exp()
    expected = torch.autograd.grad(policy_loss(ratio, setup.credit.advantages[rows, 0], 0.1)[0].mean(), setup.policy.bias)[0]
    setup.run(Watch())
    assert seen[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings, steps, pairs",
    [
        ({}, 6, 3),  # 3 slots x 2 batches
        ({"update__batch_size": 6}, 3, 6),
        ({"update__timestep_fraction": 0.7}, 4, 3),  # int(3 * 0.7) = 2 slots
        ({"algorithm__name": "ddpo", "algorithm__update_mode": "all-timesteps"}, 2, 9),
    ],
)
def test_number_and_size_of_optimizer_steps(settings, steps, pairs):
    setup = Setup(**settings)
    taken = setup.run()
    assert len(taken) == steps == setup.preset.updates_per_epoch
    assert {len(step.batch.sample_index) for step in taken} == {pairs}


@pytest.mark.parametrize("mode", ["per-timestep", "all-timesteps"])
def test_every_pair_is_visited_once(mode):
    steps = Setup(algorithm__name="ddpo", algorithm__update_mode=mode).run()
    visited = [pair for step in steps for pair in zip(step.batch.sample_index.tolist(), step.batch.step_index.tolist(), strict=True)]
    assert sorted(visited) == [(i, k) for i in range(6) for k in range(3)]


def test_slots_are_the_outer_loop():
    assert [step.batch.step_index.tolist() for step in Setup().run()] == [[0] * 3] * 2 + [[1] * 3] * 2 + [[2] * 3] * 2


def test_ddpo_has_no_critic_to_update():
    steps = Setup(algorithm__name="ddpo").run()
    facts = summarise(steps, World())
    assert facts["critic_loss"] is facts["critic_clip_fraction"] is facts["critic_grad_norm"] is None
    assert facts["policy_loss"] is not None


def test_training_without_guidance_ignores_the_rollouts():
    on = Setup(rollout__guidance_scale=5.0)
    off = Setup(rollout__guidance_scale=5.0, update__guidance=False)
    # the trajectory was made without guidance, so only `off` finds its own log-probs again
    assert off.run()[0].policy.log_ratios.abs().max() <= ROUNDING
    assert on.run()[0].policy.log_ratios.abs().max() > 1e-3


def test_dropout_can_be_switched_off():
    setup = Setup(algorithm__critic_dropout=False)
    expected = setup.critic(setup.everyone.image_embeds[:3, 0])
    assert same_output(setup.run()[0].critic.values, expected)
    assert not Setup().run()[0].critic.values.allclose(expected, atol=1e-4)


def test_more_critic_steps_move_the_critic_alone():
    runs = {}
    for count in (1, 2):
        runs[count] = Setup(algorithm__critic_steps=count, algorithm__critic_dropout=False, update__batch_size=6, update__timestep_fraction=0.4)
        assert len(runs[count].run()) == 1
    by_hand = Setup(algorithm__critic_dropout=False, update__batch_size=6, update__timestep_fraction=0.4)
    by_hand.run()
    # gathered as the update does, so that the products are the same to the last bit: Adam would turn it into a step of an element near 0
    embeds = by_hand.everyone.image_embeds[torch.arange(6), torch.zeros(6, dtype=torch.int64)]
    returns, old = by_hand.credit.returns[:, 0], by_hand.everyone.values[:, 0]
    by_hand.optimizers.critic.zero_grad()
    critic_loss(by_hand.critic(embeds), old, returns, by_hand.preset.update.clip_range_critic)[0].mean().backward()
    torch.nn.utils.clip_grad_norm_(by_hand.critic.parameters(), by_hand.preset.update.max_grad_norm)
    by_hand.optimizers.critic.step()
    for layer, expected, once in zip(runs[2].critic.layers, by_hand.critic.layers, runs[1].critic.layers, strict=True):
        assert layer.weight.allclose(expected.weight, atol=1e-6)
        assert not layer.weight.allclose(once.weight, atol=1e-4)
    assert torch.equal(runs[1].policy.weight, runs[2].policy.weight)


def test_critic_coef_scales_the_critics_gradient():
    norms = [Setup(algorithm__critic_coef=coef).run()[0].outcome.critic_grad_norm.item() for coef in (1.0, 0.25)]
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-5)


# --- clipping -----------------------------------------------------------------------------------------------------------
class Gradients(Observer):
    """Keeps the gradients before and after clipping."""

    def __init__(self, setup):
        self.setup, self.before, self.after = setup, [], []

    def norms(self):
        networks = self.setup.policy.trainable.values(), self.setup.critic.parameters()
        return tuple(torch.cat([p.grad.flatten() for p in network]).norm().item() for network in networks)

    def gradients(self, index):
        self.before.append(self.norms())

    def after_step(self, step):
        self.after.append(self.norms())


def test_the_two_networks_are_clipped_separately():
    setup = Setup(update__max_grad_norm=0.05)
    # a return far away gives the critic a gradient that would starve the policy's, were they clipped together
    setup.credit = dataclasses.replace(setup.credit, returns=setup.credit.returns * 1000, advantages=setup.credit.advantages * 0.01)
    watch = Gradients(setup)
    steps = setup.run(watch)
    (policy, critic), (policy_after, critic_after) = watch.before[0], watch.after[0]
    assert policy < 0.05 < critic
    assert policy_after == pytest.approx(policy, rel=1e-6)
    assert critic_after == pytest.approx(0.05 * critic / (critic + 1e-6), rel=1e-5)
    # what is logged is the norm before
    assert (steps[0].outcome.policy_grad_norm.item(), steps[0].outcome.critic_grad_norm.item()) == pytest.approx((policy, critic), rel=1e-5)


# --- steps that go wrong --------------------------------------------------------------------------------------------------
def poisoned(setup, sample=0, k=1):
    """The advantage of one pair becomes NaN: one optimizer step of six cannot be taken."""
    advantages = setup.credit.advantages.clone()
    advantages[sample, k] = float("nan")
    setup.credit = dataclasses.replace(setup.credit, advantages=advantages)
    return setup


class Weights(Observer):
    def __init__(self, setup):
        self.setup, self.moved = setup, []

    def before_step(self, batch):
        self.before = self.setup.weights

    def after_step(self, step):
        self.moved.append(not self.before.equal(self.setup.weights))


def test_a_non_finite_gradient_skips_the_step_of_both_networks_and_counts():
    setup = poisoned(Setup())
    watch = Weights(setup)
    steps = setup.run(watch)
    assert [step.outcome.skipped for step in steps] == [False, False, True, False, False, False]
    assert watch.moved == [True, True, False, True, True, True]
    facts = summarise(steps, World())
    assert facts["skipped_steps"] == 1
    assert all(value is None or math.isfinite(value) for value in facts.values())


def test_a_non_finite_critic_skips_the_policys_step_too():
    setup = Setup()
    returns = setup.credit.returns.clone()
    returns[0, 0] = float("inf")
    setup.credit = dataclasses.replace(setup.credit, returns=returns)
    watch = Weights(setup)
    setup.run(watch)
    assert watch.moved == [False, True, True, True, True, True]


def test_an_epoch_of_nothing_but_bad_steps_is_an_error():
    setup = Setup()
    setup.credit = dataclasses.replace(setup.credit, advantages=setup.credit.advantages * float("nan"))
    with pytest.raises(WorkError, match="every optimizer step"):
        summarise(setup.run(), World())


# --- what is logged -------------------------------------------------------------------------------------------------------
def test_summary_averages_over_all_pairs_of_the_epoch():
    steps = Setup().run()
    facts = summarise(steps, World())
    losses = torch.cat([step.policy.losses for step in steps])
    assert len(losses) == 18
    assert facts["policy_loss"] == pytest.approx(losses.mean().item())
    assert facts["critic_loss"] == pytest.approx(torch.cat([step.critic.losses for step in steps]).mean().item())
    assert facts["policy_clip_fraction"] == pytest.approx(torch.cat([step.policy.clipped for step in steps]).double().mean().item())
    assert facts["policy_grad_norm"] == pytest.approx(sum(step.outcome.policy_grad_norm.item() for step in steps) / 6)
    assert facts["approx_kl"] == pytest.approx(approx_kl(torch.cat([step.policy.log_ratios for step in steps]).double()).item())


def test_losses_are_double_precision():
    step = Setup().run()[0]
    assert step.policy.losses.dtype == step.critic.losses.dtype == torch.float64


def test_both_optimizers_read_their_own_learning_rate():
    setup = Setup(update__learning_rate=0.25, update__critic_learning_rate=0.5, update__adam_beta1=0.8)
    groups = setup.optimizers.policy.param_groups + setup.optimizers.critic.param_groups
    assert [group["lr"] for group in groups] == [0.25, 0.5]
    assert {(group["betas"], group["weight_decay"], group["eps"]) for group in groups} == {((0.8, 0.999), 1e-4, 1e-8)}


# --- the KL term ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["ddpo", "grpo", "tdpo", "tdpo-r"])
@pytest.mark.parametrize(("kind", "factor"), [("prediction", 4.0), ("gaussian", 1 / (2 * 0.5**2))])  # its prediction is twice its mean
def test_a_kl_coefficient_changes_the_gradient_by_its_own_gradient(algorithm, kind, factor):
    def first_gradient(coefficient):
        setup, seen = Setup(algorithm__name=algorithm, update__kl_coef=coefficient, update__kl_kind=kind, rollout__images_per_prompt=2), []

        class Watch(Observer):
            def gradients(self, index):
                seen.append(setup.policy.bias.grad.item())

        with torch.no_grad():
            setup.policy.bias += 0.2  # no longer the reference
        steps = setup.run(Watch())
        return seen[0], setup, steps[0]

    plain, setup, without = first_gradient(0.0)
    with_kl, _, step = first_gradient(0.7)
    # the means differ by 0.2 m with m the mean of the sample's text: d/dbias of factor (0.2 m)^2 is factor 2 0.2 m^2
    m = setup.everyone.texts.parts["embeds"].mean(dim=(1, 2))[:3].double()
    assert with_kl - plain == pytest.approx(0.7 * factor * 2 * 0.2 * (m**2).mean().item(), rel=1e-3)
    assert step.policy.kl.double().tolist() == pytest.approx((factor * (0.2 * m) ** 2).tolist(), rel=1e-4)
    assert not without.policy.kl.any()


def test_statistics_per_step_are_of_that_step():
    steps = Setup(algorithm__name="ddpo").run()
    row = per_step(steps, 4, World())
    for k in range(3):
        ratios = torch.cat([step.policy.ratios[step.batch.step_index[step.batch.own] == k] for step in steps]).double()
        clipped = torch.cat([step.policy.clipped[step.batch.step_index[step.batch.own] == k] for step in steps]).double()
        assert row["steps/ratio_mean"][k] == pytest.approx(ratios.mean().item(), rel=1e-12)
        assert row["steps/ratio_std"][k] == pytest.approx(ratios.std(correction=0).item(), rel=1e-9)
        assert row["steps/clip_fraction"][k] == clipped.mean().item()
    assert [values[3] for values in row.values()] == [None] * 3  # no pair was of it


def test_ratio_drift_is_named_once():
    rows = [{"epoch": epoch, "ratio_drift": drift} for epoch, drift in enumerate([1e-5, 3e-5, 4e-5])]
    said = [drift_line(rows[: n + 1], make_preset(update__clip_range=1e-4)) for n in range(3)]
    assert [line is not None for line in said] == [False, True, False]
    assert "3e-05" in said[1] and "2e-05" in said[1] and "update.guidance" in said[1]
    assert drift_line(rows, make_preset(update__clip_range=1e-2)) is None
