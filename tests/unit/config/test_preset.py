"""Facts about presets and settings: what they hold, what they refuse and how they say so."""

import dataclasses
import json
import sys

import pytest
from helpers import make_preset

from tdpo_cli.algorithms import ACTS_ON, ALGORITHMS
from tdpo_cli.config import preset as presets
from tdpo_cli.config.fields import SettingError, said, suggest
from tdpo_cli.config.settings import SECTIONS, Preset, describe
from tdpo_cli.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def refusal(*overrides, text=None, tmp_path=None):
    """The message with which overrides, or a preset file of this text, are refused."""
    with pytest.raises(SettingError) as caught:
        if text is None:
            presets.override(Preset(), overrides)
        else:
            file = tmp_path / "mine.toml"
            file.write_text(text)
            presets.load(str(file))
    return str(caught.value)


# --- shipped presets --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", presets.names())
def test_every_shipped_preset_parses_and_has_held_out_prompts(name):
    assert presets.load(name).rollout.eval_prompts is not None


def test_the_quickstart_is_shipped():
    assert "quickstart" in presets.names()


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_survives_toml_json_and_back(name, tmp_path):
    preset = presets.load(name)
    assert presets.from_dict(tomllib.loads(presets.as_toml(preset)), "toml") == preset
    file = tmp_path / "preset.json"
    file.write_text(json.dumps(preset.as_dict()))
    assert presets.load(str(file)) == preset
    assert presets.load(str(file)).digest() == preset.digest()


def test_paths_and_quotes_survive_toml():
    preset = make_preset(reward__checkpoints={"hpsv2.1": 'C:\\a "b"'}, rollout__negative_prompt='ü\n"x"', model__revision="v1")
    assert presets.from_dict(tomllib.loads(presets.as_toml(preset)), "toml") == preset


def test_digests_tell_presets_apart():
    assert make_preset(run__seed=1).digest() != make_preset(run__seed=2).digest()


def test_defaults_are_the_published_numbers():
    # ALGORITHM.md, section 7
    preset = Preset()
    assert preset.model.base == "CompVis/stable-diffusion-v1-4"
    assert (preset.rollout.samples_per_epoch, preset.update.batch_size, preset.rollout.steps) == (256, 128, 50)
    assert (preset.update.learning_rate, preset.update.critic_learning_rate) == (1e-4, 1e-4)
    assert (preset.update.clip_range, preset.update.clip_range_critic) == (1e-4, 0.2)
    assert (preset.reward.buffer_size, preset.reward.min_count) == (32, 16)
    assert (preset.algorithm.reset_every, preset.algorithm.dormant_threshold, preset.algorithm.neuron_rows) == (10, 0.0, 64)
    assert preset.updates_per_epoch == 100
    assert preset.reward_queries == 25_600


# --- refusals -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("update.learning_rte", 1, "--set: unknown key update.learning_rte. Did you mean update.learning_rate?"),
        ("updte.learning_rate", 1, "--set: unknown key updte.learning_rate. Did you mean update.learning_rate?"),
        ("epochs", 1, "--set: unknown key epochs. Did you mean run.epochs?"),
        ("qqqq", 1, "--set: unknown key qqqq."),
        ("run.epochs", "ten", '--set: run.epochs: expected a whole number, got "ten" (a string).'),
        ("run.epochs", 2.5, "--set: run.epochs: expected a whole number, got 2.5 (a number)."),
        ("run.epochs", True, "--set: run.epochs: expected a whole number, got true (true or false)."),
        ("update.learning_rate", "fast", '--set: update.learning_rate: expected a number, got "fast" (a string).'),
        ("update.learning_rate", True, "--set: update.learning_rate: expected a number, got true (true or false)."),
        ("model.tf32", 1, "--set: model.tf32: expected true or false, got 1 (a whole number)."),
        ("model.base", 4, "--set: model.base: expected a string, got 4 (a whole number)."),
        ("reward.watch", [1], "--set: reward.watch: expected a list of strings, got [1] (a list)."),
        ("reward.checkpoints", 3, "--set: reward.checkpoints: expected a table of strings, got 3 (a whole number)."),
        ("reward.checkpoints.gold", 3, '--set: reward.checkpoints: expected a table of strings, got {"gold": 3} (a table).'),
        ("update.learning_rate", float("nan"), "--set: update.learning_rate: nan is not a finite number."),
        ("algorithm.kl_target", float("inf"), "--set: algorithm.kl_target: inf is not a finite number."),
        ("algorithm.name", "tpdo", '--set: algorithm.name: "tpdo" (a string) is not one of ddpo, grpo, tdpo, tdpo-r. Did you mean tdpo?'),
        ("algorithm.kl_penalty", "KL", '--set: algorithm.kl_penalty: "KL" (a string) is not one of kl, abs, square, clip, approx, js.'),
        ("run.epochs.x", 1, "--set: unknown key run.epochs.x. Did you mean run.epochs?"),
    ],
)
def test_a_wrong_override_is_one_message(key, value, message):
    assert refusal((key, value)) == message


@pytest.mark.parametrize(
    "key, value, limit",
    [
        ("run.epochs", 0, "0 is out of range; it must be at least 1"),
        ("rollout.eta", 0, "0.0 is out of range; it must be above 0"),
        ("rollout.eta", 1.5, "1.5 is out of range; it must be at most 1"),
        ("rollout.steps", 1001, "1001 is out of range; it must be at most 1000"),
        ("update.adam_beta2", 1, "1.0 is out of range; it must be below 1"),
    ],
)
def test_a_value_out_of_range_names_the_limit_and_what_the_setting_means(key, value, limit):
    meaning = next(doc for known, _, _, doc in describe() if known == key)
    assert refusal((key, value)) == f"--set: {key}: {limit} ({meaning})."


@pytest.mark.parametrize(
    "text, message",
    [
        ("[updte]\nbatch_size = 1", "mine.toml: unknown section [updte]. Did you mean update?"),
        ("[update]\nlearning_rte = 1", "mine.toml: unknown key update.learning_rte. Did you mean update.learning_rate?"),
        ("update = 3", "mine.toml: [update] must be a table of keys, not 3 (a whole number)."),
    ],
)
def test_a_wrong_file_is_one_message(text, message, tmp_path):
    assert refusal(text=text, tmp_path=tmp_path) == message


def test_broken_toml_names_file_and_place(tmp_path):
    message = refusal(text="[run\n", tmp_path=tmp_path)
    assert message.startswith(f"{tmp_path / 'mine.toml'}: not a valid preset file") and "line 1" in message


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    message = refusal(("update.batch_size", 100))
    assert message == "--set: update.batch_size 100 does not divide rollout.samples_per_epoch 256. These would: 16, 32, 64, 128."


@pytest.mark.parametrize(
    "overrides, part",
    [
        ([("update.timestep_fraction", 0.01)], "selects no step. Use at least 0.02"),
        ([("algorithm.name", "grpo"), ("rollout.images_per_prompt", 7)], "rollout.images_per_prompt 7 does not divide rollout.samples_per_epoch 256"),
        ([("algorithm.name", "grpo"), ("rollout.samples_per_epoch", 260), ("update.batch_size", 130)], "rollout.images_per_prompt 8 does not divide"),
        ([("reward.buffer_size", 8)], "reward.min_count 16 is never reached with reward.buffer_size 8"),
        ([("reward.watch", ["gold", "aesthetic"])], "'aesthetic' is named twice"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(overrides, part):
    assert part in refusal(*overrides)


def test_the_suggested_timestep_fraction_is_accepted():
    for steps in (1, 3, 7, 49, 50, 600, 1000):  # 49 * (1 / 49) is below 1
        message = refusal(("rollout.steps", steps), ("update.timestep_fraction", 1e-4))
        suggested = float(message.rpartition("Use at least ")[2].rstrip("."))
        assert make_preset(rollout__steps=steps, update__timestep_fraction=suggested).trained_steps >= 1


def test_an_unknown_preset_suggests_a_known_one():
    with pytest.raises(SettingError, match="unknown preset 'quikstart'. Did you mean quickstart"):
        presets.load("quikstart")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match="none.toml: no such preset file"):
        presets.load(str(tmp_path / "none.toml"))


def test_a_wrong_setting_is_a_wrong_request():
    assert issubclass(SettingError, RequestError)


# --- overrides ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, expected",
    [
        ("run.epochs=3", ("run.epochs", 3)),
        ("update.learning_rate = 1e-3", ("update.learning_rate", 1e-3)),
        ("model.tf32=false", ("model.tf32", False)),
        ("model.base=sandbox", ("model.base", "sandbox")),
        ('model.base="sandbox"', ("model.base", "sandbox")),
        ("model.base=/a/b c.d", ("model.base", "/a/b c.d")),
        ("model.base=owner/name=odd", ("model.base", "owner/name=odd")),
        ('reward.watch=["gold", "hpsv2"]', ("reward.watch", ["gold", "hpsv2"])),
        ("reward.watch=gold,hpsv2", ("reward.watch", "gold,hpsv2")),
        ("reward.watch=[]", ("reward.watch", [])),
        ("run.keep_last=none", ("run.keep_last", None)),
        ("run.keep_last=None", ("run.keep_last", None)),
        ("algorithm.reset_target=none", ("algorithm.reset_target", "none")),
        ("reward.normalise=none", ("reward.normalise", "none")),
        ("rollout.negative_prompt=", ("rollout.negative_prompt", "")),
    ],
)
def test_set_reads_toml_bare_words_and_none(text, expected):
    key, value = presets.parse_override(text)
    assert ((key, value), type(value)) == (expected, type(expected[1]))
    presets.override(Preset(), [(key, value)])


def test_set_without_a_value_is_refused():
    with pytest.raises(SettingError, match="--set run.epochs: expected section.key=value"):
        presets.parse_override("run.epochs")


def test_lists_may_be_comma_separated_words():
    assert make_preset(reward__watch="gold, hpsv2").reward.watch == ("gold", "hpsv2")


def test_whole_numbers_are_numbers():
    rate = make_preset(rollout__guidance_scale=5).rollout.guidance_scale
    assert (rate, type(rate)) == (5.0, float)


def test_checkpoints_are_reached_one_by_one_even_with_dots_in_their_names():
    preset = presets.override(Preset(), [("reward.checkpoints.hpsv2.1", "/a"), ("reward.checkpoints.gold", "/b")])
    assert preset.reward.checkpoints == {"hpsv2.1": "/a", "gold": "/b"}


def test_later_overrides_win():
    assert presets.override(Preset(), [("run.seed", 1), ("run.seed", 2)]).run.seed == 2


def test_overrides_are_checked_together_not_one_by_one():
    # 100 divides neither 256 nor the new number of samples until both are known
    assert make_preset(update__batch_size=100, rollout__samples_per_epoch=300).update.batch_size == 100


def test_an_override_leaves_the_original_alone():
    preset = Preset()
    presets.override(preset, [("reward.checkpoints.gold", "/a")])
    assert preset.reward.checkpoints == {} and preset == Preset()


def test_differences_name_key_and_both_values():
    assert presets.differences(make_preset(run__seed=1), make_preset(run__seed=2, reward__watch=["gold"])) == [
        ("reward.watch", [], ["gold"]), ("run.seed", 1, 2),
    ]  # fmt: skip


# --- arithmetic ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, trained_steps, updates",
    [
        ({}, 50, 100),
        ({"update__inner_epochs": 3}, 50, 300),
        ({"update__timestep_fraction": 0.5}, 25, 50),
        ({"update__timestep_fraction": 0.39, "rollout__steps": 10}, 3, 6),
        ({"update__batch_size": 256}, 50, 50),
        ({"algorithm__name": "ddpo", "algorithm__update_mode": "all-timesteps"}, 50, 2),
    ],
)
def test_batch_arithmetic(settings, trained_steps, updates):
    preset = make_preset(**settings)
    assert (preset.trained_steps, preset.updates_per_epoch) == (trained_steps, updates)


@pytest.mark.parametrize(
    "settings, needed",
    [
        ({}, False),
        ({"algorithm__reference": True}, True),
        ({"algorithm__kl_penalty_coef": 0.1}, True),
        ({"algorithm__kl_target": 6}, True),
        ({"update__kl_coef": 0.1}, True),
    ],
)
def test_when_a_reference_is_needed(settings, needed):
    assert make_preset(**settings).needs_reference is needed


def test_a_kl_term_in_the_loss_scores_nothing_in_the_rollout():
    assert not make_preset(update__kl_coef=0.1).scores_reference


def test_ddpo_and_grpo_have_no_critic():
    assert [make_preset(algorithm__name=name).has_critic for name in ("ddpo", "grpo", "tdpo", "tdpo-r")] == [False, False, True, True]


# --- settings of other algorithms -----------------------------------------------------------------------------------------
def test_every_key_of_the_table_exists():
    assert ACTS_ON.keys() <= {key for key, _, _, _ in describe()}


def test_settings_of_the_file_that_the_algorithm_does_not_read_are_named():
    assert presets.without_effect(presets.load("quickstart")) == []
    other = presets.load("quickstart", [("algorithm.name", "grpo")])
    assert presets.without_effect(other) == ["algorithm.critic_init_std", "update.critic_learning_rate"]
    assert other.algorithm.critic_init_std == 0.11  # kept, so that a third algorithm finds it in preset.json


@pytest.mark.parametrize(
    ("algorithm", "key", "value", "acts_on"),
    [
        ("tdpo-r", "algorithm.update_mode", "all-timesteps", "ddpo, grpo"),
        ("tdpo-r", "rollout.images_per_prompt", 4, "grpo"),
        ("ddpo", "algorithm.guard", True, "grpo"),
        ("grpo", "reward.normalise", "global", "ddpo, tdpo, tdpo-r"),
        ("ddpo", "update.critic_learning_rate", 1e-2, "tdpo, tdpo-r"),
        ("tdpo", "algorithm.reset_every", 5, "tdpo-r"),
    ],
)
def test_a_setting_of_another_algorithm_is_refused_on_the_command_line(algorithm, key, value, acts_on):
    with pytest.raises(presets.SettingError) as error:
        presets.load("quickstart", [("algorithm.name", algorithm), (key, value)])
    assert str(error.value) == f"--set: {key} acts on {acts_on} and not on {algorithm}. Leave it out."
    default = next(default for known, _, default, _ in describe() if known == key)
    presets.load("quickstart", [("algorithm.name", algorithm), (key, default)])


def test_groups_belong_to_grpo():
    assert [make_preset(algorithm__name=name).group_size for name in ("ddpo", "grpo", "tdpo")] == [None, 8, None]
    assert make_preset(algorithm__name="grpo", rollout__images_per_prompt=4).group_size == 4


def test_the_training_reward_comes_first():
    assert make_preset(reward__watch=["gold", "hpsv2"]).rewards == ("aesthetic", "gold", "hpsv2")


# --- descriptions -------------------------------------------------------------------------------------------------------
def test_every_setting_explains_itself():
    rows = list(describe())
    assert len(rows) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())
    assert all(kind and doc for _, kind, _, doc in rows)
    assert ("run.keep_last", "a whole number | none", None) in [row[:3] for row in rows]


def test_every_default_fits_its_own_declaration():
    for key, _, default, _ in describe():
        presets.override(Preset(), [(key, list(default) if isinstance(default, tuple) else default)])


def test_suggestions_need_some_likeness():
    assert suggest("epoch", ["epochs", "seed"], prefix="run.") == " Did you mean run.epochs?"
    assert suggest("zzz", ["epochs", "seed"]) == ""


def test_long_values_are_cut_in_messages():
    assert said("x" * 100) == '"' + "x" * 56 + "... (a string)"


# --- several rewards, constraints -------------------------------------------------------------------------------------------
SEVERAL = [("reward.train_weights.pickscore", 1.0), ("reward.train_weights.hpsv2", 0.5)]


def test_train_is_the_first_of_the_weights_and_what_trains_is_not_watched():
    preset = presets.override(Preset(), [("reward.watch", ["gold", "hpsv2", "imagereward"]), *SEVERAL])
    assert preset.reward.train == "pickscore" and preset.reward.watch == ("gold", "imagereward")
    assert (preset.weights, preset.trained, preset.trained_words) == ({"pickscore": 1.0, "hpsv2": 0.5}, "combined", "pickscore + 0.5 hpsv2")
    assert presets.from_dict(preset.as_dict(), "again") == preset  # as a run's preset.json
    again = presets.override(preset, [("reward.train_weights", {}), ("reward.train", "aesthetic")])
    assert again.weights == {"aesthetic": 1.0} and again.trained == "aesthetic"


def test_a_constrained_reward_is_watched_and_judges_nothing():
    preset = presets.override(Preset(), [("reward.watch", ["gold", "imagereward"]), ("reward.at_least.hpsv2", -0.2)])
    assert preset.reward.watch == ("gold", "imagereward", "hpsv2") and preset.judges == ("imagereward",)


def test_tables_of_numbers_are_read_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[reward.train_weights]\npickscore = 1\nhpsv2 = 0.5\n[reward.at_least]\nimagereward = -0.2\n")
    preset = presets.load(str(file))
    assert preset.rewards == ("pickscore", "hpsv2", "imagereward") and preset.reward.at_least == {"imagereward": -0.2}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([("reward.at_least.gold", -0.2)], "gold is the truth .* never be a constraint"),
        ([("reward.at_least.aesthetic", -0.2)], "aesthetic trains"),
        ([*SEVERAL, ("reward.at_least.hpsv2", -0.2)], "hpsv2 trains"),
        ([("reward.at_least.hpsv2", float("nan"))], "nan is not a finite number"),
        ([("reward.at_least.hpsv2", "low")], "reward.at_least.hpsv2: expected a number"),
        ([("reward.train_weights.hpsv2", 0.0)], "0.0 is out of range; it must be above 0"),
        ([("reward.train_weights.hpsv2", float("inf"))], "inf is not a finite number"),
        ([("reward.train_weights", {"hpsv2": {"1": 2.0}})], "A name with a dot in it needs quotes"),
        ([("reward.train_weights", 3)], "expected a table of numbers"),
        ([*SEVERAL, ("reward.train", "aesthetic")], "reward.train is 'aesthetic' and reward.train_weights begins with 'pickscore'"),
        ([("reward.constraint_rate", 0.5)], "constraint_rate 0.5 does nothing without a constraint"),
        ([*SEVERAL, ("reward.normalise", "none")], "reward.normalise none leaves pickscore, hpsv2 on scales of their own"),
        ([("reward.at_least.hpsv2", 0), ("algorithm.name", "grpo"), ("algorithm.advantage_std", "none")], "advantage_std none leaves"),
    ],
)
def test_nonsense_of_several_rewards_and_constraints_is_refused(overrides, part):
    with pytest.raises(SettingError, match=part):
        presets.override(Preset(), overrides)


def test_the_table_of_settings_and_algorithms_is_the_programs(root):
    """docs/algorithm.md; the lines that it must hold are in the message."""
    lines = [f"| setting | {' | '.join(ALGORITHMS)} |", "|---|" + "---|" * len(ALGORITHMS)]
    lines += [f"| `{key}` | {' | '.join('yes' if name in names else '' for name in ALGORITHMS)} |" for key, names in ACTS_ON.items()]
    text = (root / "docs" / "algorithm.md").read_text()
    assert "\n".join(lines) in text, "\n".join(lines)
    assert {key for key, *_ in describe()} >= ACTS_ON.keys()
