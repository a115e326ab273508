"""Facts about numbers that are not finite: named, skipped, counted; what is finite is trained on as if alone."""

import math

import pytest
import tiny
import torch
from helpers import LinearPolicy, make_preset, make_trajectory, tdpo

from tdpo_cli import algorithms
from tdpo_cli.algorithms import ALGORITHMS
from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.storage.run_dir import RunDir

# a reward that fails as its file's first line says; calls are counted, one per epoch (4 samples, one micro-batch)
REWARD = """
import torch
calls = 0
def brightness(images, prompts):
    global calls
    epoch, calls = calls, calls + 1
    scores = images.mean(dim=(1, 2, 3))
    {spoil}
    return scores
def steady(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


def train(folder, spoil, *more, reward="train=brightness"):
    role, function = reward.split("=")
    name = f"my_{len(list(folder.glob('*.py')))}.py"  # a module of its own for every run
    (folder / name).write_text(REWARD.format(spoil=spoil))
    run = folder / "run"
    value = f"{folder / name}:{function}"
    outcome = tdpo("train", "--preset", tiny.preset(folder), "--out", run, "--set", f"reward.{role}={value}", *more)
    assert "Traceback" not in outcome.err
    return run, value, outcome


# --- the training reward --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", ["nan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inf", "-inf"))])
def test_a_broken_score_skips_the_steps_that_hold_it_and_only_them(tmp_path, number):
    run, name, outcome = train(tmp_path, f"scores[1] = float('{number}') if epoch == 1 else scores[1]")
    assert outcome.status == 0, outcome.err
    first, broken, after = tiny.rows(run)
    assert [row["skipped_steps"] for row in (first, broken, after)] == [0, 2, 0]  # once in every timestep's pass
    assert [row["updates"] for row in (first, broken, after)] == [4, 6, 10]
    mean = broken[f"rewards/{name}/mean"]
    assert 0 < mean < 1 and broken["policy_loss"] is not None and broken["critic_explained_variance"] is not None
    # named: which reward, for which prompt, which step
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"epoch 1: reward {name} gave 1 non-finite scores, for 'a " in warnings[0]
    assert "epoch 1, inner epoch 0, optimizer step " in warnings[1] and "non-finite policy loss, for 'a " in warnings[1]
    assert "skipped 2 of 4 optimizer steps" in outcome.err
    state = RunDir(run).load_state()[1]
    assert state["bad_steps"] == 2 and all(tensor.isfinite().all() for tensor in state["policy"].values())
    assert all(math.isfinite(reward) for rewards in state["algorithm"]["returns"]["moments"]["recent"].values() for reward in rewards)


@pytest.mark.parametrize("advantages", ["global", "per-prompt", "none"])
@pytest.mark.parametrize("rewards", ["global", "per-prompt", "none"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_other_samples_earn_what_they_would_earn_alone(name, rewards, advantages):
    preset = make_preset(
        algorithm__name=name, reward__normalise=rewards, algorithm__advantage_norm=advantages, reward__min_count=2, reward__buffer_size=4
    )
    everyone = make_trajectory(LinearPolicy(), 6)
    scores = torch.tensor([0.1, float("nan"), 0.4, 0.3, 0.9, -0.2])
    keep = [0, 2, 3, 4, 5]
    whole, alone = algorithms.make(preset), algorithms.make(preset)
    credit = credit_of(whole, everyone, {preset.reward.train: scores})
    import dataclasses

    part = {field: getattr(everyone, field)[keep] for field in ("log_probs", "values")}
    keys = tuple(everyone.prompt_keys[i] for i in keep)
    expected = alone.credit(dataclasses.replace(everyone, prompts=keys, prompt_keys=keys, **part), scores[keep])
    for field in ("advantages", "returns", "normed_rewards"):
        assert getattr(credit, field)[1].isnan().all()
        assert getattr(credit, field)[keep].equal(getattr(expected, field))
    assert whole.state_dict() == alone.state_dict()


def test_finite_numbers_take_the_plain_way():
    preset, everyone, scores = make_preset(), make_trajectory(LinearPolicy(), 4), torch.tensor([0.1, 0.2, 0.4, 0.3])
    credit, plain = credit_of(algorithms.make(preset), everyone, {"any": scores}), algorithms.make(preset).credit(everyone, scores)
    assert credit.advantages.equal(plain.advantages) and credit.returns.equal(plain.returns)


@pytest.mark.slow
def test_too_many_skipped_steps_stop_the_run_with_the_state_intact(tmp_path):
    spoil = "scores[2] = float('nan') if epoch > 0 else scores[2]"
    run, name, outcome = train(tmp_path, spoil, "--set", "run.max_bad_steps=3")
    assert outcome.status == 1
    assert "3 optimizer steps with a non-finite loss or gradient (run.max_bad_steps)" in outcome.err and "epoch 2, " in outcome.err
    assert [row["skipped_steps"] for row in tiny.rows(run)] == [0, 2]
    epoch, state = RunDir(run).load_state()
    assert (epoch, state["bad_steps"]) == (1, 2) and all(tensor.isfinite().all() for tensor in state["policy"].values())


@pytest.mark.slow
def test_a_reward_with_nothing_but_broken_scores_stops_the_run(tmp_path):
    run, name, outcome = train(tmp_path, "scores[:] = float('nan') if epoch == 1 else scores[:]")
    assert outcome.status == 1 and f"epoch 1: reward {name} gave 4 non-finite scores" in outcome.err
    assert "No sample is left to train on. The last finished epoch is safe on disk." in outcome.err
    assert RunDir(run).load_state()[0] == 0


@pytest.mark.slow
def test_a_reward_that_raises_is_named(tmp_path):
    run, name, outcome = train(tmp_path, "if epoch == 1: raise ZeroDivisionError('by hand')")
    assert outcome.status == 1 and f"epoch 1: reward {name} failed: ZeroDivisionError: by hand" in outcome.err
    assert RunDir(run).load_state()[0] == 0


# --- watched rewards ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_broken_watched_score_is_a_null_mean_and_changes_nothing_else(tmp_path):
    run, name, outcome = train(tmp_path, "scores[0] = float('nan') if epoch == 0 else scores[0]", reward="watch=brightness")
    assert outcome.status == 0, outcome.err
    assert f"epoch 0: reward {name} gave 1 non-finite scores" in outcome.err and "no mean of it in this epoch's row" in outcome.err
    (tmp_path / "calm").mkdir()
    calm, other, _ = train(tmp_path / "calm", "pass", reward="watch=steady")
    for row, expected in zip(tiny.rows(run), tiny.rows(calm), strict=True):
        broken = row["epoch"] == 0
        for what in ("mean", "std"):
            value, wanted = row.pop(f"rewards/{name}/{what}"), expected.pop(f"rewards/{other}/{what}")
            assert value is None if broken else value == wanted
        agreement, wanted = row.pop("agreement"), expected.pop("agreement")
        assert agreement is None if broken else agreement == wanted
        assert row == expected
    card = (run / "checkpoints/epoch_0000/README.md").read_text()
    assert "| watched | - | - | - |" in card  # no epoch 0, no epoch of the card (which is epoch 0), no rise


# --- the networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_sample_whose_log_probabilities_broke_is_left_out(tmp_path, monkeypatch):
    import dataclasses

    from tdpo_cli.train.rollout import Actor

    real, calls = Actor.rollout, []

    def broken(*arguments, **more):
        trajectory = real(*arguments, **more)
        calls.append(1)
        if len(calls) == 2:
            trajectory.log_probs[3, 0] = float("nan")
        return dataclasses.replace(trajectory)

    monkeypatch.setattr(Actor, "rollout", broken)
    run, name, outcome = train(tmp_path, "pass")
    assert outcome.status == 0, outcome.err
    assert [row["skipped_steps"] for row in tiny.rows(run)] == [0, 2, 0]
    assert "epoch 1: the networks gave non-finite log-probabilities or values for 'a " in outcome.err
