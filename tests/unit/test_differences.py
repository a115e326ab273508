"""Where the official code does something else than it means, we do what it means: docs/differences.md names these tests."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_preset, tdpo

from tdpo_cli import models
from tdpo_cli.algorithms import moments, reset
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.config.fields import SettingError
from tdpo_cli.config.settings import Model
from tdpo_cli.console import Console
from tdpo_cli.machine.memory import Plan
from tdpo_cli.machine.world import World
from tdpo_cli.randomness import Randomness
from tdpo_cli.train import train
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import build, make_optimizers

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "tests/data/trace_a/model/pipeline")


def tiny(**settings):
    """Four samples of two steps of the golden trace's model, against a reward without weights."""
    small = {
        "model__base": TINY, "model__lora_rank": 2, "model__dtype": "fp32", "rollout__samples_per_epoch": 4, "rollout__steps": 2,
        "reward__train": "jpeg-compressibility", "reward__zoo": "sandbox", "reward__min_count": 2, "algorithm__neuron_rows": 2,
        "update__batch_size": 2, "update__learning_rate": 1e-3, "run__epochs": 2, "run__preview_images": 0,
    }  # fmt: skip
    return make_preset(**(small | settings))


# --- half precision ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def half_policy():
    """Networks in bf16, as on a GPU; the LoRA stays fp32."""
    policy = models.load(Model(base=TINY, lora_rank=2))
    with torch.no_grad():
        for network in (policy.family.network, policy.family.pipeline.vae, policy.family.pipeline.text_encoder):
            for name, parameter in network.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.bfloat16()
    policy._negative = policy.family.encode([""])
    policy.set_schedule(10, 1.0)
    return policy


def three_cats(policy):
    preset = make_preset(rollout__samples_per_epoch=3, rollout__steps=10, update__batch_size=3)
    actor = Actor(policy, None, None, Randomness(0), preset, Plan.of(3))
    return actor.rollout(actor.draw(0, ["a cat"]), range(3))


@torch.no_grad()
def log_ratios(policy, trajectory, latents):
    """log p(x' | x) recomputed from `latents`, against what the rollout recorded. -> [B,T]"""
    columns = []
    for k in range(len(policy.timesteps)):
        step = torch.full((len(trajectory),), k)
        transition = policy.transition(latents[:, k], step, trajectory.texts, trajectory.text_rows, 5.0)
        columns.append(transition.log_prob(latents[:, k + 1]) - trajectory.log_probs[:, k])
    return torch.stack(columns, dim=1)


@pytest.mark.slow
def test_latents_and_log_probs_are_fp32_with_half_precision_networks(half_policy):
    trajectory = three_cats(half_policy)
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32
    assert log_ratios(half_policy, trajectory, trajectory.latents).abs().max() == 0


@pytest.mark.slow
def test_rounded_latents_would_spoil_the_ratio(half_policy):
    """What the official code stores in half precision: on-policy log ratios beyond the clip range of 1e-4."""
    trajectory = three_cats(half_policy)
    rounded = trajectory.latents.bfloat16().float()
    assert log_ratios(half_policy, trajectory, rounded).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_critic_and_its_optimizer_are_fp32_whatever_the_networks_are(dtype):
    policy = models.load(Model(base=TINY, lora_rank=2, dtype=dtype), device="meta")
    critic = Critic(8)
    optimizers = make_optimizers(policy, critic, tiny(model__dtype=dtype))
    assert {p.dtype for p in critic.parameters()} == {p.dtype for p in policy.trainable.values()} == {torch.float32}
    critic(torch.randn(2, 8).half()).sum().backward()
    optimizers.critic.step()
    kinds = {value.dtype for state in optimizers.critic.state.values() for name, value in state.items() if name != "step"}
    assert kinds == {torch.float32}


def test_dormancy_scores_are_finite_where_fp16_underflows():
    """At the published initial weights, std 1/769, nearly all of the fourth layer's outputs are below fp16's smallest number."""
    critic = Critic(768)
    critic.initialise(torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    # image embeddings look alike: one direction and a little of everything
    embeds = torch.nn.functional.normalize(torch.randn(768, generator=draw) + 0.1 * torch.randn(64, 768, generator=draw), dim=1)
    fourth = critic.outputs(embeds)[3]
    assert (fourth.half() == 0).double().mean() > 0.9 and (fourth != 0).all()
    census = reset.census(critic, embeds, 0.0)
    assert all(scores.isfinite().all() for scores in census.scores)
    assert 0.3 < census.dormant_count / census.total < 0.7


# --- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_resume_replays_nothing_and_needs_no_older_checkpoint(tmp_path, monkeypatch):
    train.run(tiny(), tmp_path, False, Console(quiet=True))
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "state" / "epoch_0000")
    sampled = []
    real = Actor.rollout
    monkeypatch.setattr(Actor, "rollout", lambda actor, draw, *others: sampled.append(draw.epoch) or real(actor, draw, *others))
    train.run(tiny(run__epochs=3), tmp_path, True, Console(quiet=True))
    assert sampled == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_0002"]  # numbers go on
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["per-prompt", "global"])
def test_all_running_statistics_are_in_the_state(kind):
    preset = tiny(reward__normalise=kind, algorithm__advantage_norm="per-prompt", algorithm__kl_penalty_coef=1.0, algorithm__kl_target=0.1)
    job = build(preset, World(), Plan.of(4))
    run_epoch(job, 0, Console(quiet=True))
    again = build(preset, World(), Plan.of(4))
    again.load_state_dict(job.state_dict())
    for one, other in ((job.algorithm, again.algorithm),):
        assert one.returns.moments.state_dict() == other.returns.moments.state_dict() != type(one.returns.moments)(*_arguments(kind)).state_dict()
        assert one.advantage_moments.state_dict() == other.advantage_moments.state_dict() != {"recent": {}}
        assert one.returns.controller.beta == other.returns.controller.beta != preset.algorithm.init_kl_coef
        assert all(map(torch.equal, one.dormant, other.dormant))


def _arguments(kind):
    return (32, 16) if kind == "per-prompt" else ()


# --- one exchange of gradients per optimizer step -----------------------------------------------------------------------
@pytest.mark.slow
def test_gradients_are_exchanged_once_per_optimizer_step():
    class Counting(World):
        exchanges = 0

        def sum_gradients(self, parameters):
            self.exchanges += 1

    world = Counting()
    row = run_epoch(build(tiny(), world, Plan.of(1)), 0, Console(quiet=True))
    assert world.exchanges == row["updates"] == 4


# --- configuration --------------------------------------------------------------------------------------------------------
def test_eta_0_is_refused_with_the_reason():
    outcome = tdpo("train", "--dry-run", "--set", "rollout.eta=0")
    assert outcome.status == 2
    assert "rollout.eta: 0.0 is out of range; it must be above 0 (DDIM noise; a policy gradient needs some)" in outcome.err


def test_an_unknown_kl_mode_is_refused():
    with pytest.raises(SettingError, match="algorithm.kl_penalty: .*one of kl, abs, square, clip, approx, js. Did you mean square"):
        make_preset(algorithm__kl_penalty="squared")


@pytest.mark.parametrize(
    ("key", "value"),
    [("algorithm.kl_penalty_coef", 0.5), ("algorithm.gamma", 0.95), ("reward.clip_range", 2.5), ("algorithm.critic_coef", 0.5)],
)
def test_fractions_are_numbers_too(key, value):
    section, name = key.split(".")
    outcome = tdpo("train", "--dry-run", "--json", "--set", f"{key}={value}")
    assert json.loads(outcome.out)["preset"][section][name] == value


def test_an_option_that_does_nothing_does_not_exist():
    """The official base configuration has a `reward_fn` that nobody reads; here an unknown key is an error."""
    with pytest.raises(SettingError, match="unknown key reward.fn"):
        presets.override(presets.Preset(), [("reward.fn", "aesthetic")])


@pytest.mark.parametrize("width", [768, 1024])
def test_critic_is_reset_as_it_was_initialised_for_every_encoder(width):
    """The official reset takes PickScore's 1024-wide critic for a 768-wide one."""
    critic = Critic(width)
    critic.initialise(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(critic.parameters())
    everyone = [torch.ones(layer.out_features, dtype=torch.bool) for layer in critic.layers[:-1]]
    reset.reinitialise(critic, optimizer, everyone, torch.Generator().manual_seed(1))
    assert critic.layers[0].weight.std().item() == pytest.approx(1 / (width + 1), rel=0.01)


def test_every_reset_draws_new_weights():
    """The official code seeds every reset alike."""
    randomness = Randomness(42)
    draws = [torch.randn(4, generator=randomness.reset(epoch, inner)) for epoch, inner in ((9, 0), (19, 0), (9, 1))]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


@pytest.mark.slow
def test_advantages_per_prompt_can_be_asked_for():
    """Officially a call of a method that does not exist."""
    job = build(tiny(algorithm__advantage_norm="per-prompt"), World(), Plan.of(4))
    assert run_epoch(job, 0, Console(quiet=True))["policy_loss"] is not None
    assert isinstance(job.algorithm.advantage_moments, moments.PerPromptMoments)


# --- prompts --------------------------------------------------------------------------------------------------------------
def test_blank_lines_of_the_hpsv2_list_are_no_prompts(tmp_path, monkeypatch):
    import huggingface_hub

    file = tmp_path / "photo.json"
    file.write_text(json.dumps(["a dog", "", "a cat", "  \n", "a bird"]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: str(file))
    assert prompts.load("hpsv2:photo") == ["a dog", "a cat", "a bird"]
    local = tmp_path / "photo.txt"
    local.write_text("a dog\n\na cat\n   \na bird\n")
    assert prompts.load(str(local)) == ["a dog", "a cat", "a bird"]


# --- the last checkpoint ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_last_epoch_is_always_a_checkpoint(tmp_path):
    """The official `epoch % save_freq == 0` keeps epoch 0 and may leave out the last."""
    train.run(tiny(run__epochs=3, run__save_every=2), tmp_path, False, Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch_0001", "epoch_0002"]


# --- the page itself -----------------------------------------------------------------------------------------------------------
def named_tests(page):
    return set(re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / page).read_text()))


@pytest.mark.parametrize("page", ["differences.md", "algorithm.md"])
def test_every_test_that_the_docs_name_exists(page):
    named = named_tests(page)
    assert named
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")}


def test_every_function_that_algorithm_md_names_exists():
    import importlib

    named = re.findall(r"`(tdpo_cli(?:\.\w+)+):(\w+(?:\.\w+)*)`", (ROOT / "docs/algorithm.md").read_text())
    assert len(named) > 20
    for module, path in named:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part) if not dataclasses.is_dataclass(found) or hasattr(found, part) else found.__dataclass_fields__[part]
