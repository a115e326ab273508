"""Settings that belong to one kind of model: filled in where they apply, refused with the reason where they do not."""

import json

import pytest
from flow_models import SD3
from helpers import tdpo

from tdpo_cli import models
from tdpo_cli.config import preset as presets
from tdpo_cli.config.fields import SettingError
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.models import settings
from tdpo_cli.randomness import Randomness
from tdpo_cli.train.state import set_schedule

DDIM, FLOW = models.FAMILIES["StableDiffusionPipeline"], models.FAMILIES["StableDiffusion3Pipeline"]


def preset_of(**rollout):
    return presets.override(Preset(), [(f"rollout.{key}", value) for key, value in ({"steps": 8} | rollout).items()])


def noise_of(preset):
    rollout = preset.rollout
    return rollout.eta, rollout.dynamics, rollout.noise_level, rollout.window


def test_what_is_not_set_is_the_familys_own():
    assert noise_of(settings.fit(preset_of(), DDIM)) == (1.0, None, None, None)
    assert noise_of(settings.fit(preset_of(), FLOW)) == (None, "flow-sde", 0.7, None)
    assert noise_of(settings.fit(preset_of(dynamics="cps", noise_level=0.8), FLOW)) == (None, "cps", 0.8, None)
    assert noise_of(settings.fit(preset_of(eta=0.5, dynamics="ddim"), DDIM)) == (0.5, "ddim", None, None)


def test_the_critic_sees_x_t_on_ddim_and_x0_on_flow_models_unless_told_otherwise():
    seen = lambda entry, **algorithm: (
        settings.fit(presets.override(preset_of(), [(f"algorithm.{key}", value) for key, value in algorithm.items()]), entry).algorithm.critic_state
    )
    assert (seen(DDIM), seen(FLOW)) == ("x_t", "x0")
    assert (seen(DDIM, critic_state="x0"), seen(FLOW, critic_state="x_t")) == ("x0", "x_t")
    assert seen(FLOW, name="ddpo") is None


@pytest.mark.parametrize(
    ("entry", "written", "reason"),
    [
        (FLOW, {"eta": 1.0}, "rollout.eta is for DDIM; Stable Diffusion 3 and 3.5 is a flow-matching model, whose noise is rollout.noise_level"),
        (FLOW, {"dynamics": "ddim"}, "rollout.dynamics is for DDIM"),
        (DDIM, {"noise_level": 0.7}, "rollout.noise_level is for flow-matching models; Stable Diffusion 1.x and 2.x is sampled with DDIM"),
        (DDIM, {"dynamics": "cps"}, "rollout.dynamics is for flow-matching models"),
        (DDIM, {"window": [2, 0, 4]}, "rollout.window is for flow-matching models"),
    ],
)
def test_a_value_of_another_kind_of_family_is_refused(entry, written, reason):
    with pytest.raises(RequestError) as error:
        settings.fit(preset_of(**written), entry)
    assert str(error.value).startswith(reason)
    assert str(error.value).endswith(f"Leave it out: --set rollout.{next(iter(written))}=none")


def test_drop_t5_is_refused_where_no_encoder_may_be_missing():
    preset = presets.override(Preset(), [("model.drop_t5", True)])
    settings.fit(preset, FLOW)
    for entry in (DDIM, models.FAMILIES["FluxPipeline"]):
        with pytest.raises(RequestError, match="model.drop_t5 is for Stable Diffusion 3; .* needs all its text encoders"):
            settings.fit(preset, entry)


def test_a_family_that_the_installed_diffusers_lacks_names_the_version(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    for here, refused in (("0.36.0", True), ("0.38.1", True), ("0.39.0.dev0", False), ("0.40", False), ("1.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda package, here=here: here)
        with pytest.raises(RequestError) as error:  # there is nothing else in the folder
            models.load(Model(base=str(tmp_path)))
        assert (f"Z-Image needs diffusers >= 0.39, here is {here}: pip install -U diffusers" in str(error.value)) is refused


def test_a_tiny_decoder_is_refused_where_none_is_made():
    tiny = presets.override(preset_of(), [("model.tiny_vae", "some/where"), ("algorithm.critic_view", "tiny")])
    settings.fit(tiny, models.FAMILIES["ZImagePipeline"])
    for name in ("Flux2KleinPipeline", "QwenImagePipeline"):
        entry = models.FAMILIES[name]
        with pytest.raises(RequestError, match=f"no AutoencoderTiny exists for the latents of {entry.title}. Use .*critic_view=decode"):
            settings.fit(tiny, entry)
        settings.fit(presets.override(tiny, [("algorithm.name", "grpo")]), entry)  # no critic looks


@pytest.mark.parametrize("written", [{"noise_level": 0.7}, {"dynamics": "cps"}, {"window": 2}])
def test_settings_of_both_kinds_contradict_each_other_whatever_the_model(written):
    with pytest.raises(SettingError, match="rollout.eta 1.0 is for DDIM and rollout.*for flow-matching models. Leave one out"):
        preset_of(eta=1.0, **written)


# --- the window -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([2, 0, 5], (2, 0, 5)),
        ([2, [0, 5]], (2, 0, 5)),
        ({"size": 2, "range": [0, 5]}, (2, 0, 5)),
        (3, (3, 0, -1)),
    ],
)
def test_a_window_may_be_written_in_several_forms(written, read):
    assert preset_of(window=written).rollout.window == read


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ([9, 0, 8], "rollout.window of 9 steps must be at least 1 and fit into the 8 steps 0 .. 7"),
        ([3, 4, 6], "rollout.window of 3 steps must be at least 1 and fit into the 2 steps 4 .. 5"),
        (8, "rollout.window of 8 steps must be at least 1 and fit into the 7 steps 0 .. 6"),
        ([0, 0, 4], "rollout.window of 0 steps must be at least 1"),
        ([1, 4, 4], "first 4 and last 4 must be 0 <= first < last <= rollout.steps 8"),
        ([2, 0, 9], "first 0 and last 9 must be 0 <= first < last <= rollout.steps 8"),
        ([2, 0], r"expected \[size, first, last\] or a size"),
        ("two", r"expected \[size, first, last\] or a size"),
    ],
)
def test_a_window_that_does_not_fit_is_refused_with_the_numbers(written, reason):
    with pytest.raises(SettingError, match=reason):
        preset_of(window=written)


def test_trained_steps_are_counted_without_a_model():
    assert preset_of().stochastic_steps == 8  # DDIM
    assert preset_of(dynamics="flow-sde").stochastic_steps == 7
    assert preset_of(window=[3, 0, 5]).stochastic_steps == 3
    halved = presets.override(preset_of(window=[4, 0, 8]), [("update.timestep_fraction", 0.5)])
    assert halved.trained_steps == 2
    with pytest.raises(SettingError, match="the last step of a flow model is not trained, so give at least 2"):
        preset_of(steps=1, dynamics="flow-sde")


class Recorder:
    """In place of a policy: what schedules are asked for."""

    def __init__(self):
        self.asked = []

    def set_schedule(self, *arguments):
        self.asked.append(arguments)


def test_an_epochs_window_is_a_function_of_seed_and_epoch():
    preset, policy = preset_of(dynamics="cps", noise_level=0.8, window=[2, 1, 6]), Recorder()
    for epoch in [*range(40), 0, 1]:
        assert set_schedule(policy, preset, Randomness(3), epoch) is preset
    assert {(steps, noise, dynamics) for steps, noise, dynamics, _ in policy.asked} == {(8, 0.8, "cps")}
    windows = [window for *_, window in policy.asked]
    assert set(windows) == {(first, 2) for first in (1, 2, 3, 4)}  # all four occur
    assert windows[:2] == windows[40:]
    other = Recorder()
    for epoch in range(40):
        set_schedule(other, preset, Randomness(4), epoch)
    assert [window for *_, window in other.asked] != windows[:40]


def test_cps_without_a_window_trains_the_steps_before_the_noise_becomes_tiny():
    policy = models.load(presets.override(Preset(), [("model.base", str(SD3)), ("model.dtype", "fp32")]).model)
    preset = set_schedule(policy, preset_of(steps=10, dynamics="cps", noise_level=0.8), Randomness(0))
    assert preset.rollout.window == (8, 0, 8) and preset.stochastic_steps == 8
    assert policy.stochastic.tolist() == [True] * 8 + [False] * 2


# --- on the command line ----------------------------------------------------------------------------------------------------------
def test_a_dry_run_reads_a_local_model_and_says_what_it_is():
    outcome = tdpo("train", "--dry-run", "--set", f"model.base={SD3}", "--set", "rollout.steps=10")
    assert outcome.status == 0
    assert "Stable Diffusion 3 and 3.5" in outcome.err and "flow-sde, noise level 0.7, in 9 of 10 steps" in outcome.err
    outcome = tdpo("train", "--dry-run", "--json", "--set", f"model.base={SD3}", "--set", "rollout.steps=10", "--set", "rollout.window=[2,0,5]")
    facts = json.loads(outcome.out)
    assert facts["preset"]["rollout"]["dynamics"] == "flow-sde" and facts["preset"]["rollout"]["eta"] is None
    assert facts["updates_per_epoch"] == 2 * facts["samples_per_epoch"] // facts["effective_batch"]


def test_a_dry_run_of_a_hub_id_leaves_the_family_open():
    outcome = tdpo("train", "--dry-run", "--preset", "pickscore", "--set", "model.base=someone/a-model")
    assert outcome.status == 0 and "unknown until downloaded" in outcome.err


def test_a_published_preset_on_a_flow_model_is_refused_with_the_way_out():
    outcome = tdpo("train", "--dry-run", "--preset", "pickscore", "--set", f"model.base={SD3}")
    assert outcome.status == 2 and "rollout.eta is for DDIM" in outcome.err and "--set rollout.eta=none" in outcome.err
    assert tdpo("train", "--dry-run", "--preset", "pickscore", "--set", f"model.base={SD3}", "--set", "rollout.eta=none").status == 0


def test_values_left_to_the_family_do_not_hinder_a_resume():
    """A run of 0.1 has eta 1.0 written; the shipped preset leaves it to the family now."""
    recorded = presets.load("quickstart", [("rollout.eta", 1.0)])
    wanted = presets.load("quickstart")
    assert presets.differences(recorded, wanted)
    assert not presets.differences(recorded, presets.own_values(wanted, recorded))
    changed = presets.load("quickstart", [("rollout.eta", 0.5)])
    assert [key for key, *_ in presets.differences(recorded, presets.own_values(changed, recorded))] == ["rollout.eta"]
