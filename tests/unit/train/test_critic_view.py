"""Facts about what the critic sees: which latent (critic_state), and by which decoder it becomes a picture (critic_view)."""

import dataclasses
import json

import pytest
import tiny
import torch
from flow_models import SD3
from helpers import make_preset, tdpo, tiny_vae

from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import preset as presets
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine import footprint, memory
from tdpo_cli.machine.networks import networks
from tdpo_cli.machine.world import World
from tdpo_cli.train import views
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import build

SMALL = {
    "model__base": "sandbox", "model__lora_rank": 2, "model__dtype": "fp32", "rollout__prompts": "sandbox",
    "rollout__samples_per_epoch": 4, "rollout__steps": 4, "rollout__guidance_scale": 2.0, "reward__train": "gold", "reward__zoo": "sandbox",
    "reward__min_count": 2, "algorithm__name": "tdpo", "update__batch_size": 2, "run__preview_images": 0,
}  # fmt: skip
# 3 of 4 steps have noise, and then 2 that begin with the second
FLOW = SMALL | {"model__base": str(SD3), "model__resolution": 32}
WINDOW = FLOW | {"rollout__window": [2, 1, 3]}


def start(settings, batch=4):
    return build(make_preset(**settings), World(), memory.Plan.of(batch))


def rolled(job, batch=3):
    actor = Actor(job.policy, job.critic, job.encoder, job.randomness, job.preset, memory.Plan(batch, batch, 3), job.backbones, job.view)
    return actor.rollout(actor.draw(0, job.prompts), range(job.preset.rollout.samples_per_epoch))


# --- critic_state -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [(SMALL | {"algorithm__critic_state": "x0"}, [0, 1, 2, 3]), (FLOW, [0, 1, 2]), (WINDOW, [1, 2])],
    ids=["ddim", "flow", "window"],
)
def test_x0_shows_the_guided_clean_image_of_every_trained_step_and_the_time(settings, steps):
    job = start(settings)
    seen = rolled(job)
    width = job.encoder.embed_dim
    assert seen.steps.tolist() == steps
    assert seen.image_embeds.shape == (4, len(steps), width + 1) and seen.values.shape == (4, len(steps))
    assert torch.equal(seen.image_embeds[:, :, -1], torch.tensor(steps).div(4).expand(4, -1))  # k/T
    for column, k in enumerate(steps):
        with torch.no_grad():
            x0 = job.policy.transition(seen.latents[:, column], torch.full((4,), k), seen.texts, seen.text_rows, 2.0).x0
            expected = job.encoder(job.policy.decode(x0))
        # other batches, other rounding: at most a grey level of some pixels
        assert torch.allclose(seen.image_embeds[:, column, :-1], expected, atol=2e-3)
        if column == 0:  # near the end the state is almost clean itself
            of_the_state = job.encoder(job.policy.decode(seen.latents[:, column]))
            assert (expected - of_the_state).abs().max() > 2e-2
    assert torch.allclose(seen.values, job.critic(seen.image_embeds).detach(), atol=1e-6)
    assert not seen.image_embeds.requires_grad


@pytest.mark.slow
def test_x_t_shows_the_state_before_the_step_on_a_flow_model_too():
    job = start(WINDOW | {"algorithm__critic_state": "x_t"})
    seen = rolled(job)
    assert seen.image_embeds.shape == (4, 2, job.encoder.embed_dim)
    for column in range(2):
        expected = job.encoder(job.policy.decode(seen.latents[:, column]))
        assert torch.allclose(seen.image_embeds[:, column], expected, atol=2e-3)


def test_the_time_widens_the_first_layer_only_and_leaves_the_initial_spread():
    plain, wide = Critic(8), Critic(8, beside=1)
    assert [tuple(layer.weight.shape) for layer in wide.layers][0] == (1024, 9)
    assert [layer.weight.shape for layer in wide.layers[1:]] == [layer.weight.shape for layer in plain.layers[1:]]
    assert wide.init_std == plain.init_std == 1 / 9
    with torch.no_grad():
        for layer in wide.layers:
            layer.weight.fill_(0.5)
            layer.bias.zero_()
    # 0.5 (sum + k/T), then four layers that each sum their inputs times 0.5
    assert wide(torch.tensor([[*[0.0] * 7, 1.0, 0.25]])).item() == 0.5 * 1.25 * 512 * 64 * 32 * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tdpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tdpo-r", "ddpo"))])
@pytest.mark.parametrize("base", [SMALL | {"algorithm__critic_state": "x0"}, pytest.param(FLOW, marks=pytest.mark.slow)], ids=["ddim", "flow"])
def test_every_algorithm_trains_with_x0(name, base):
    job = start(base | {"algorithm__name": name, "algorithm__reset_every": 1, "algorithm__neuron_rows": 2})
    row = run_epoch(job, 0, Console(quiet=True))
    assert row["skipped_steps"] == 0 and row["updates"] == job.preset.updates_per_epoch
    assert (row["critic_loss"] is None) == (name == "ddpo")
    if name == "tdpo-r":
        assert row["reset"] > 0


def test_clean_images_are_counted_while_they_are_kept():
    preset = lambda state: make_preset(**SMALL | {"algorithm__critic_state": state})
    nets = networks(preset("x_t"))
    assert nets.latent_elements == 4 * 8 * 8
    assert footprint.clean_bytes(preset("x0"), nets, 1) == 4 * 4 * 256 * 4  # samples x steps x elements x bytes
    assert footprint.clean_bytes(preset("x0"), nets, 3) == 2 * 4 * 256 * 4
    assert footprint.clean_bytes(preset("x_t"), nets, 1) == 0
    assert footprint.clean_bytes(make_preset(**SMALL | {"algorithm__critic_state": "x0", "algorithm__name": "ddpo"}), nets, 1) == 0
    widened = 4 * 4 * 4  # samples x steps x bytes: k/T beside every embedding
    assert footprint.trajectory_bytes(preset("x0"), nets, 1) - footprint.trajectory_bytes(preset("x_t"), nets, 1) == widened
    phases = [memory.phases(preset(state), gpu=False) for state in ("x0", "x_t")]
    more = {name: phases[0][name] - phases[1][name] for name in phases[0]}
    kept = 4 * 4 * 256 * 4
    assert all(abs(more[name] - expected) <= 1 for name, expected in
               {"sampling": kept + widened, "decoding": kept + widened, "scoring": widened, "training": widened}.items())  # fmt: skip


# --- critic_view ------------------------------------------------------------------------------------------------------------
def test_rgb_recovers_a_planted_linear_map():
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 6, generator=draw)
    weight, bias = torch.tensor([[0.1, -0.2, 0.3], [0.05, 0.0, -0.1], [-0.3, 0.2, 0.1]]), torch.tensor([0.5, 0.4, 0.6])
    colours = torch.stack([sum(weight[c, r] * latents[:, c] for c in range(3)) + bias[r] for r in range(3)], dim=1)
    # details within a square that cancel: only its mean counts
    images = colours.repeat_interleave(2, 2).repeat_interleave(2, 3)
    images = images + torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(4, 6)
    found = views.least_squares(latents, images)
    assert torch.allclose(found[0].float(), weight, atol=1e-6) and torch.allclose(found[1].float(), bias, atol=1e-6)
    view = views.RGB(found[0].float(), found[1].float(), enlarge=2)
    shown = view(latents)
    assert shown.shape == (2, 3, 8, 12)
    one_colour = view(latents[:1, :, :1, :1].expand(1, 3, 4, 4))
    assert torch.allclose(one_colour, colours[:1, :, :1, :1].clamp(0, 1).expand(1, 3, 8, 8), atol=1e-6)


def test_rgb_of_dependent_channels_is_the_smallest_map():
    latents = torch.arange(4.0).view(1, 1, 2, 2).repeat(1, 2, 1, 1)  # twice the same channel
    weight, bias = views.least_squares(latents, (latents[:, :1] * 0.2).repeat(1, 3, 1, 1))
    assert torch.allclose(weight, torch.full((2, 3), 0.1, dtype=torch.float64), atol=1e-6) and bias.abs().max() < 1e-6


@pytest.mark.slow
def test_rgb_is_a_function_of_the_seed_and_shows_colours_like_the_decoder():
    settings = SMALL | {"algorithm__critic_view": "rgb", "rollout__steps": 8}
    one, other_plan, other_seed = start(settings), start(settings, batch=3), start(settings | {"run__seed": 7})
    assert torch.allclose(one.view.weight, other_plan.view.weight, atol=1e-3)
    assert not torch.allclose(one.view.weight, other_seed.view.weight, atol=1e-3)
    assert torch.equal(one.view.weight, start(settings).view.weight)
    seen = rolled(one)
    decoded, shown = one.policy.decode(seen.latents[:, -1]), one.view(seen.latents[:, -1])
    assert shown.shape == decoded.shape and 0 <= shown.min() and shown.max() <= 1
    residue = (decoded - shown).pow(2).mean() / (decoded - decoded.mean(dim=(0, 2, 3), keepdim=True)).pow(2).mean()
    assert residue < 0.5  # of the variance; images that the fit did not see
    assert torch.allclose(seen.image_embeds[:, 0], one.encoder(one.view(seen.latents[:, 0])), atol=2e-3)


@pytest.mark.slow
def test_tiny_scales_by_its_own_numbers(tmp_path):
    job = start(SMALL | {"algorithm__critic_view": "tiny", "model__tiny_vae": tiny_vae(tmp_path)})
    vae, latents = job.view.vae, torch.randn(2, *job.policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (vae.decoder(latents) / 2 + 0.5).clamp(0, 1)  # scale 1, shift 0: not those of the model's VAE
        assert torch.equal(job.view(latents), expected)
        assert expected.shape == (2, 3, 32, 32)
        vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
        assert torch.equal(job.view(latents), (vae.decoder(latents / 2 + 0.5) / 2 + 0.5).clamp(0, 1))
    assert not any(parameter.requires_grad for parameter in vae.parameters()) and not job.view.state_dict()
    with pytest.raises(WorkError, match="model.tiny_vae decoded an image that is not finite"):
        job.view(torch.full_like(latents, float("nan")))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"channels": 16}, "decodes latents of 16 channels; this model's have 4"),
        ({"factor": 8}, "enlarges latents 8 times, this model's VAE 4 times"),
    ],
)
def test_a_tiny_vae_of_other_latents_is_refused(tmp_path, made, reason):
    with pytest.raises(RequestError, match=f"{reason}. Name one that was made for this model, or use --set algorithm.critic_view=decode"):
        start(SMALL | {"algorithm__critic_view": "tiny", "model__tiny_vae": tiny_vae(tmp_path, **made)})


@pytest.mark.slow
def test_a_view_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(presets.SettingError, match="critic_view tiny needs model.tiny_vae"):
        make_preset(**SMALL | {"algorithm__critic_view": "tiny"})
    make_preset(**SMALL | {"algorithm__critic_view": "tiny", "algorithm__name": "ddpo"})  # no critic looks
    with pytest.raises(RequestError, match=r"model.tiny_vae .*nowhere: no such folder, and not a hub id"):
        start(SMALL | {"algorithm__critic_view": "tiny", "model__tiny_vae": str(tmp_path / "nowhere")})
    job = start(SMALL)
    job.policy.latent_shape = (4, 1, 8, 8)  # a video's
    preset = dataclasses.replace(job.preset, algorithm=dataclasses.replace(job.preset.algorithm, critic_view="rgb"))
    with pytest.raises(RequestError, match=r"critic_view rgb is for latents of channels x height x width; this model's are \[4, 1, 8, 8\]"):
        views.make(job.policy, preset)


# --- resume -----------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("view", [pytest.param("decode", marks=pytest.mark.slow), "rgb"])
def test_a_resumed_run_with_x0_equals_a_straight_one(tmp_path, view):
    file = tiny.preset(tmp_path, algorithm__critic_state="x0", algorithm__critic_view=view, run__epochs=2)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert tdpo("train", "--preset", file, "--out", straight).status == 0
    assert tdpo("train", "--preset", file, "--out", cut, "--epochs", 1).status == 0
    assert json.loads((cut / "preset.json").read_text())["algorithm"]["critic_state"] == "x0"
    assert tdpo("train", "--resume", "--out", cut, "--epochs", 2).status == 0
    assert tiny.outcome_of(cut) == tiny.outcome_of(straight)


@pytest.mark.slow
def test_a_fitted_map_is_restored_and_not_fitted_again(tmp_path):
    settings = SMALL | {"algorithm__critic_view": "rgb"}
    job = start(settings)
    state = job.state_dict()
    state["view"] = {name: value + 1 for name, value in state["view"].items()}
    again = start(settings)
    again.load_state_dict(state)
    assert torch.equal(again.view.weight, job.view.weight + 1)
    del state["view"]  # of an older version, whose critic had one view
    start(SMALL).load_state_dict(state)
