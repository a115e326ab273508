"""Facts about the command line: quick where nothing is computed, one clear line where something is wrong."""

import json
import os
import subprocess
import sys

import pytest
from helpers import make_preset, tdpo

from tdpo_cli import __version__
from tdpo_cli.config import preset as presets
from tdpo_cli.models import settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def shell(*arguments, cwd):
    """The command in a process of its own; the last line of standard error lists the heavy libraries it loaded."""
    program = (
        f"import sys, atexit; sys.argv = {['tdpo', *map(str, arguments)]!r}\n"
        f"atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))\n"
        "from tdpo_cli.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Away from the source tree: whatever a command writes by mistake shows up here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments):
    """The one message of a refused request: exit status 2, nothing on standard output, no traceback, nothing written."""
    before = sorted(os.listdir())
    outcome = tdpo(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("tdpo: ") and "Traceback" not in outcome.err
    assert sorted(os.listdir()) == before
    return outcome.err.removeprefix("tdpo: ").strip()


# --- quick --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "--dry-run", "--json"], ["presets"]], ids=lambda words: " ".join(words)
)
def test_commands_that_compute_nothing_load_no_heavy_library(arguments, elsewhere):
    process = shell(*arguments, cwd=elsewhere)
    assert process.returncode == 0, process.stderr
    assert process.stdout and process.stderr.splitlines()[-1] == "[]"
    assert list(elsewhere.iterdir()) == []


# --- help and version ---------------------------------------------------------------------------------------------------
def test_version():
    outcome = tdpo("--version")
    assert (outcome.status, outcome.out, outcome.err) == (0, f"tdpo {__version__}\n", "")


def test_help_lists_the_commands():
    outcome = tdpo("--help")
    assert outcome.status == 0
    assert all(command in outcome.out for command in ("train", "sample", "presets"))


def test_without_a_command_help_is_shown():
    assert "train" in (tdpo().out + tdpo().err)


OPTIONS = {
    "train": "--preset --set --algorithm --seed --epochs --stop-on-overoptimisation --out --resume --tracker "
    "--gpus --processes "
    "--checkpoint --zoo --trust-rewards --memory-limit --dry-run --json --quiet",
    "sample": "--preset --epoch --out --per-prompt --seed --batch-size --steps --guidance-scale --eta --negative-prompt --lora-scale "
    "--device --dtype --gpus --processes --json --quiet",
    "cross-eval": "--rewards --prompts --per-prompt --seed --out --epoch --preset --set --checkpoint --zoo --trust-rewards --batch-size "
    "--device --gpus --processes --json --quiet",
    "presets": "--json",
    "export": "--format --out --epoch --json --quiet",
    "report": "--out --json --quiet",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_of_the_contract_is_there(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = tdpo(command, "--help").out
    assert [option for option in OPTIONS[command].split() if option not in shown] == []


# --- dry run ------------------------------------------------------------------------------------------------------------
def test_a_dry_run_says_what_would_happen_and_writes_nothing(elsewhere):
    outcome = tdpo("train", "--preset", "quickstart", "--dry-run", "--json")
    facts = json.loads(outcome.out)
    preset = presets.load("quickstart")
    assert outcome.status == 0 and list(elsewhere.iterdir()) == []
    assert facts["preset"] == settings.fit(preset, settings.entry_of(preset)).as_dict()  # with the family's own noise
    assert facts["samples_per_epoch"] == preset.rollout.samples_per_epoch
    assert facts["effective_batch"] == preset.update.batch_size
    assert facts["updates_per_epoch"] == preset.updates_per_epoch
    assert facts["reward_queries"] == preset.reward_queries
    assert isinstance(facts["peak_memory_bytes"], int) and facts["peak_memory_bytes"] > 1e8


def test_a_dry_run_for_people(elsewhere):
    outcome = tdpo("train", "--dry-run")
    assert outcome.status == 0 and outcome.out == ""
    assert "nothing is written" in outcome.err and "optimizer steps" in outcome.err
    assert list(elsewhere.iterdir()) == []


def test_options_reach_the_preset():
    arguments = ["--algorithm", "ddpo", "--seed", 7, "--epochs", 3, "--set", "rollout.steps=4", "--checkpoint", "hpsv2.1=/w", "--zoo", "sandbox"]
    preset = json.loads(tdpo("train", *arguments, "--dry-run", "--json").out)["preset"]
    assert (preset["algorithm"]["name"], preset["run"]["seed"], preset["run"]["epochs"]) == ("ddpo", 7, 3)
    assert (preset["rollout"]["steps"], preset["reward"]["checkpoints"], preset["reward"]["zoo"]) == (4, {"hpsv2.1": "/w"}, "sandbox")


def test_a_preset_file_may_lie_anywhere(elsewhere):
    (elsewhere / "mine.toml").write_text("[run]\nepochs = 2\n")
    assert json.loads(tdpo("train", "--preset", "mine.toml", "--dry-run", "--json").out)["preset"]["run"]["epochs"] == 2


# --- wrong requests -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "No such command 'trian'."),
        (["train", "--prest", "x"], "No such option: --prest"),
        (["train", "--epochs", "ten"], "Invalid value for '--epochs'"),
        (["train", "--preset", "quikstart"], "unknown preset 'quikstart'. Did you mean quickstart? `tdpo presets` lists them."),
        (["train", "--preset", "none.toml"], "none.toml: no such preset file."),
        (["train", "--set", "run.epoch=1"], "--set: unknown key run.epoch. Did you mean run.epochs?"),
        (["train", "--set", "run.epochs"], "--set run.epochs: expected section.key=value."),
        (["train", "--epochs", "0"], "--set: run.epochs: 0 is out of range; it must be at least 1"),
        (["train", "--algorithm", "ppo"], '--set: algorithm.name: "ppo" (a string) is not one of ddpo, grpo, tdpo, tdpo-r.'),
        (["train", "--zoo", "sandbx"], '--set: reward.zoo: "sandbx" (a string) is not one of sandbox. Did you mean sandbox?'),
        (["train", "--checkpoint", "gold"], "--checkpoint gold: expected REWARD=PATH."),
        (["train", "--set", "update.batch_size=7"], "--set: update.batch_size 7 does not divide rollout.samples_per_epoch 48."),
        (["train", "--resume"], "--resume needs --out RUN"),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no run there"),
        (["presets", "quikstart"], "unknown preset 'quikstart'. Did you mean quickstart?"),
        (["sample", "base"], "Missing argument 'PROMPTS...'"),
        (["sample", "base", "nowhere.txt"], "nowhere.txt: no such prompt file."),
        (["sample", "./nowhere", "a cat"], "./nowhere: no such checkpoint, run or model folder"),
        (["sample", "base", "a cat", "--device", "gpu9"], "--device gpu9: not a device"),
        (["sample", "base", "a cat", "--per-prompt", "0"], "Invalid value for '--per-prompt'"),
        (["sample", "base", "a cat", "--epoch", "3"], "--epoch chooses a checkpoint of a run folder, and base is none."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_request_is_exit_2_and_one_message(arguments, message):
    assert refused(*arguments).startswith(message)


def test_an_unknown_reward_is_refused_before_a_run_folder_is_made():
    assert "unknown reward 'asthetic'. Did you mean aesthetic?" in refused("train", "--set", "reward.train=asthetic", "--out", "run")


def test_a_wrong_prompt_source_is_refused_before_a_run_folder_is_made():
    assert "unknown prompt source 'simple-animal'" in refused("train", "--set", "rollout.prompts=simple-animal", "--out", "run")


def test_a_base_model_that_is_not_there_is_refused_before_a_run_folder_is_made():
    assert "./nowhere: no such model folder" in refused("train", "--set", "model.base=./nowhere", "--out", "run")


# --- presets --------------------------------------------------------------------------------------------------------------
def test_presets_lists_every_shipped_one():
    outcome = tdpo("presets")
    assert outcome.status == 0
    assert [line.split()[0] for line in outcome.out.splitlines()] == presets.names()


@pytest.mark.parametrize("name", presets.names())
def test_a_shown_preset_is_valid_toml_and_the_preset_itself(name):
    assert presets.from_dict(tomllib.loads(tdpo("presets", name).out), name) == presets.load(name)


def test_presets_as_json():
    assert json.loads(tdpo("presets", "--json").out)["quickstart"] == presets.load("quickstart").as_dict()
    assert json.loads(tdpo("presets", "quickstart", "--json").out) == presets.load("quickstart").as_dict()


def test_every_setting_is_listed_with_its_meaning():
    listed = json.loads(tdpo("presets", "--keys", "--json").out)
    assert {row["key"]: row["default"] for row in listed} == {
        f"{section}.{key}": value for section, keys in make_preset().as_dict().items() for key, value in keys.items()
    }
    assert len(tdpo("presets", "--keys").out.splitlines()) == len(listed)


# --- colours --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("environment, coloured", [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({}, False)])
def test_no_color_is_honoured(environment, coloured):
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    program = "from tdpo_cli.console import Console; Console().warn('yellow')"
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**clean, "TERM": "xterm-256color", **environment}
    )
    assert "warning: yellow" in process.stderr
    assert ("\x1b[33m" in process.stderr) is coloured


def test_a_dry_run_gives_no_figure_of_another_model(elsewhere):
    asked = ("train", "--preset", "flux-grpo-pickscore", "--set", "model.base=black-forest-labs/FLUX.2-dev", "--dry-run")
    facts = json.loads(tdpo(*asked, "--json").out)
    assert facts["peak_memory_bytes"] is None and facts["flops_per_epoch"] is None and facts["cards"] == {}
    shown = tdpo(*asked).err
    assert "memory unknown" in shown and "unknown until downloaded" in shown and "GB card" not in shown
