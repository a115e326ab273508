"""Facts about folders and files that come from elsewhere: nothing in them runs, writes or passes as whole without a word."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import make_preset, tdpo
from PIL import Image
from safetensors.torch import load_file, save_file

from tdpo_cli import models, rewards
from tdpo_cli.config import preset as presets
from tdpo_cli.console import Console, printable
from tdpo_cli.errors import LostPeer, RequestError, RewardError, WorkError
from tdpo_cli.machine import launch, memory, world
from tdpo_cli.models import checkpoints, lora_file
from tdpo_cli.rewards.custom import FunctionReward
from tdpo_cli.storage import disk
from tdpo_cli.storage.run_dir import RunDir, check_weights

WEIGHTS = "checkpoints/epoch_0001/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    outcome = tdpo("train", "--preset", tiny.preset(folder, run__epochs=2, rollout__eval_prompts="sandbox:held-out"), "--out", folder / "run")
    assert outcome.status == 0, outcome.err
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "run")


def refused(*arguments, status=2):
    outcome = tdpo(*arguments)
    assert (outcome.status, outcome.out) == (status, "") and "Traceback" not in outcome.err, outcome.err
    return outcome.err.split("tdpo: ", 1)[1]


def edit(run, section, **values):
    content = json.loads((run / "preset.json").read_text())
    content[section].update(values)
    (run / "preset.json").write_text(json.dumps(content))


# --- links ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [".lock", "log.txt", "metrics.jsonl", "env.json", "images", "state", "checkpoints", "state/epoch_0001"])
def test_a_link_in_a_run_folder_is_refused_and_what_it_points_to_stays(name, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".notes.tmp").write_text("precious")
    target = elsewhere if "." not in name else elsewhere / ".notes.tmp"
    disk.remove(run / name)
    (run / name).symlink_to(target)
    assert f"{name}: a link to {target}" in refused("train", "--resume", "--out", run, "--epochs", 3)
    assert (elsewhere / ".notes.tmp").read_text() == "precious" and len(list(elsewhere.iterdir())) == 1


def test_a_file_is_not_written_through_a_link_that_waits_for_it(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".report.html.tmp").symlink_to(tmp_path / "victim")
    disk.write_text(tmp_path / "report.html", "a page")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "report.html").read_text() == "a page"


def test_a_pipe_or_a_device_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "preset.json")
    with pytest.raises(RequestError, match="not a regular file"):
        RunDir(tmp_path).read_preset()
    with pytest.raises(RequestError, match="not a regular file, so it is not replaced"):
        disk.write_text(tmp_path / "preset.json", "{}")


# --- code -------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def evil(run):
    """A run whose preset names Python that lies in its folder."""
    (run / "reward.py").write_text('open("CANARY", "w")\ndef f(images, prompts): return images.mean(dim=(1, 2, 3))\n')
    edit(run, "reward", train="run/reward.py:f")
    return run


@pytest.mark.parametrize("command", [["cross-eval", "run"], ["train", "--resume", "--out", "run"], ["train", "--preset", "run/preset.json"]])
def test_python_that_a_run_names_does_not_run(command, evil):
    assert "names the reward 'run/reward.py:f', which is not built in" in refused(*command)
    assert not Path("CANARY").exists() and not Path("runs").exists() and not Path("cross-evals").exists()


def test_the_same_reward_on_the_command_line_or_trust_lets_it_run(evil):
    named = [("reward.train", "run/reward.py:f")]
    assert "run/reward.py:f" in presets.custom_rewards(None, named)
    rewards.check_trusted(["gold", "run/reward.py:f"], presets.custom_rewards(None, named), "run/preset.json")
    assert tdpo("train", "--preset", "run/preset.json", "--trust-rewards", "--dry-run").status == 0
    assert not Path("CANARY").exists()


def test_a_clip_config_that_names_other_code_is_refused(tmp_path):
    from tdpo_cli.rewards.networks import _check_open_clip

    config = {"vision_cfg": {}, "text_cfg": {"hf_tokenizer_name": "owner/name"}}
    with pytest.raises(RewardError, match="needs the tokenizer's files beside it"):
        _check_open_clip(config, tmp_path / "open_clip_config.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}}')
    with pytest.raises(RewardError, match="auto_map names Python code to run"):
        _check_open_clip(config, tmp_path / "open_clip_config.json")
    with pytest.raises(RewardError, match="hf_model_name names files outside"):
        _check_open_clip({"vision_cfg": {}, "text_cfg": {"hf_model_name": "owner/name"}}, tmp_path / "open_clip_config.json")


@pytest.mark.parametrize("value", [1j * torch.ones(2), SystemExit(0)])
def test_a_reward_that_exits_or_gives_complex_numbers_is_named(value, capsys):
    def function(images, prompts):
        print("words")
        if isinstance(value, SystemExit):
            raise value
        return value

    with pytest.raises((RewardError, WorkError), match="reward mine"):
        FunctionReward("mine", function, False).score(torch.zeros(2, 3, 4, 4), ["", ""])
    assert capsys.readouterr().out == ""  # standard output belongs to --json


# --- damage -----------------------------------------------------------------------------------------------------------------
def flip(file):
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + (len(content) - start) // 8 * 4 + 3] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize(
    "command", [["sample", "run", "a cat"], ["sample", f"run/{WEIGHTS}", "a cat"], ["export", "run", "--format", "kohya"], ["cross-eval", "run"]]
)
def test_a_damaged_checkpoint_is_named_by_every_reader(command, run):
    flip(run / WEIGHTS)
    assert f"{WEIGHTS} is damaged (its hash differs from the manifest)" in refused(*command)


def test_training_does_not_start_from_a_damaged_checkpoint(run):
    flip(run / WEIGHTS)
    with pytest.raises(RequestError, match="is damaged"):
        models.load(make_preset(model__base="sandbox", model__start_from=str(run)).model)


@pytest.mark.parametrize("command", [["sample", "run", "a cat"], ["export", "run", "--format", "kohya"], ["cross-eval", "run"]])
def test_a_checkpoint_without_its_manifest_is_named_and_not_passed_over(command, run):
    (run / "checkpoints/epoch_0001/manifest.json").unlink()
    assert "epoch_0001/manifest.json is missing, so this checkpoint is damaged" in refused(*command)
    assert checkpoints.find("run", None, [], epoch=0).name == "run-epoch_0000"


@pytest.mark.parametrize("name", ["/etc/hostname", "../../preset.json", ""])
def test_a_manifest_that_lists_files_elsewhere_is_damaged(name, run):
    file = run / "checkpoints/epoch_0001/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "files": {name: "0" * 64}}))
    with pytest.raises(RequestError, match="which is not a file of this folder"):
        check_weights(file.parent)


@pytest.mark.parametrize(
    "name, content",
    [
        ("preset.json", b"\xff"), ("preset.json", b"[]"), ("preset.json", b"[" * 100_000),
        ("preset.json", b'{"run": {"seed": ' + b"9" * 5000 + b"}}"),
        ("metrics.jsonl", b"5\n"), ("metrics.jsonl", b'{"epoch": 0}\n'), ("metrics.jsonl", b'{"epoch": 0, "x": 1e308}\n'),
        ("env.json", b"[5]"), ("env.json", b'[{"plan": {"micro_batch": 4, "unknown": 1}}]'), ("env.json", b"{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(name, content, run):
    (run / name).write_bytes(content)
    message = refused("report", "run")
    assert name in message and "damaged" in message


def test_a_report_names_what_it_lacks(run):
    def warnings():
        outcome = tdpo("report", run)
        assert outcome.status == 0, outcome.err
        return [line for line in outcome.err.splitlines() if line.startswith("warning")]

    edit(run, "run", preview_images=1)
    (run / "images").mkdir(exist_ok=True)
    for epoch in (0, 1):
        Image.new("RGB", (8, 8)).save(run / f"images/epoch_000{epoch}.png")
    assert warnings() == []
    (run / "env.json").unlink()
    (run / "images/epoch_0001.png").write_bytes((run / "images/epoch_0001.png").read_bytes()[:-4])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-40])  # a torn line does not count
    assert warnings() == [
        f"warning: {run}: metrics.jsonl: 1 of 2 epochs are missing or differ from the copy in epoch_0001's state; the page goes without.",
        f"warning: {run}: env.json is missing: what the run ran on is not known; the page goes without.",
    ]
    shutil.copy(run / "state/epoch_0001/metrics.jsonl", run)
    assert "images: 1 previews are missing or damaged, epoch_0001.png first" in warnings()[1]
    (run / "images/epoch_\u00b2.png").touch()  # a digit to Python, but no number
    (run / "state/epoch_\u00b2").mkdir()
    assert len(warnings()) == 2


@pytest.mark.parametrize("value", [["x"], 3, None])
def test_a_model_folder_without_a_pipeline_class_is_named(value, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": value}))
    with pytest.raises(RequestError, match="names no pipeline class"):
        models.family_of(str(tmp_path))


def test_a_text_encoder_that_names_another_model_is_refused(tmp_path):
    from tdpo_cli.models import loading

    (tmp_path / "config.json").touch()
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(RequestError, match="makes the library load another model"):
        loading._variants(tmp_path, torch.nn.Module)


def test_a_prompt_that_looks_like_a_marker_does_not_cut_the_card(run, monkeypatch):
    from tdpo_cli.report import model_card

    folder = run / "checkpoints/epoch_0001"
    text = f"# A card\n\nprompts `{model_card.BEGIN}`\n\nthe rest\n"
    check_weights(folder)
    disk.write_text(folder / "README.md", text)
    monkeypatch.setattr(model_card, "_entry", lambda *arguments: {})
    monkeypatch.setattr(model_card, "_cross_eval", lambda *arguments: "a table")
    for _ in range(2):
        assert model_card.add_cross_eval(folder, {}) is None
    assert (folder / "README.md").read_text() == f"{text}\n{model_card.BEGIN}\na table\n{model_card.END}\n"


def test_folders_that_are_not_epochs_are_passed_over(run):
    (run / "state/epoch_\N{SUPERSCRIPT TWO}").mkdir()
    (run / f"state/epoch_{'9' * 200}").mkdir()
    assert RunDir(run).load_state()[0] == 1


def test_epochs_that_do_not_ascend_are_damage(run):
    file = run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(RequestError, match="line 2 is damaged .epoch 0 follows epoch 1"):
        RunDir(run).read_metrics()


def test_weights_of_a_checkpoint_can_be_read_by_those_who_can_read_its_manifest(run):
    assert (run / WEIGHTS).stat().st_mode == (run / "checkpoints/epoch_0001/manifest.json").stat().st_mode


# --- LoRA files ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage, message", [("nan", "values that are not finite"), ("half", "the file is incomplete"), ("unknown", "fit no layer")])
def test_a_lora_that_would_load_silently_is_refused(damage, message, finished, tmp_path):
    state = load_file(finished / WEIGHTS)
    name = next(key for key in state if ".lora_A." in key)
    if damage == "nan":
        state[name] = torch.full_like(state[name], float("nan"))
    elif damage == "half":
        del state[name]
    else:
        for key in (name, name.replace("lora_A", "lora_B")):
            state[f"unet.nowhere.{key.partition('.')[2]}"] = state[key].clone()
    save_file(state, tmp_path / "it.safetensors")
    with pytest.raises(RequestError, match=message):
        models.load(make_preset(model__base="sandbox", model__start_from=str(tmp_path / "it.safetensors")).model, trainable=False)


def test_metadata_that_is_not_json_is_named(finished, tmp_path):
    save_file(load_file(finished / WEIGHTS), tmp_path / "it.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(RequestError, match="its metadata is damaged"):
        lora_file.alpha_of(tmp_path / "it.safetensors")


def test_a_scale_that_is_not_finite_is_refused(run):
    assert "--lora-scale nan" in refused("sample", "run", "a cat", "--lora-scale", "nan")


# --- resuming -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("section, values", [("run", {"seed": 3}), ("rollout", {"guidance_scale": 2.0})])
def test_a_preset_that_was_changed_on_the_disk_is_not_resumed(section, values, run):
    edit(run, section, **values)
    assert "preset.json: changed since epoch_0001 was saved" in refused("train", "--resume", "--out", run, "--epochs", 3)


def as_version_0_1(run):
    """States whose manifests carry the whole preset's digest and nothing else."""
    for file in run.glob("state/*/manifest.json"):
        content = json.loads(file.read_text())
        content.pop("settings", None)
        file.write_text(json.dumps(content))


def test_a_run_of_version_0_1_resumes_also_when_more_epochs_were_asked_for(run):
    as_version_0_1(run)
    edit(run, "run", epochs=5)
    assert RunDir(run).load_state()[0] == 1
    edit(run, "run", save_every=3)  # recorded now: what a resume may change no longer matters
    assert RunDir(run).load_state()[0] == 1
    as_version_0_1(run)
    edit(run, "run", seed=3)
    with pytest.raises(RequestError, match="changed since epoch_0001 was saved"):
        RunDir(run).load_state()


def test_a_resume_leaves_keys_of_another_version_out_of_the_preset(run):
    content = json.loads((run / "preset.json").read_text())
    del content["sampling"]
    (run / "preset.json").write_text(json.dumps(content))
    before = RunDir(run).settings_digest()
    RunDir(run).change_preset(presets.override(RunDir(run).read_preset(), [("run.epochs", 9)]))
    assert RunDir(run).settings_digest() == before and RunDir(run).read_preset().run.epochs == 9


def test_a_run_whose_folder_is_gone_stops_at_the_next_save(run):
    folder = RunDir(run)
    folder.lock()
    folder.still_there()
    run.rename("moved")
    for write in (folder.still_there, lambda: folder.log({"epoch": 2}), lambda: folder.save_state(2, {}, "")):
        with pytest.raises(WorkError, match="was removed, moved or replaced"):
            write()
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("left", [[], [".lock", "log.txt", ".preset.json.tmp"]])
def test_the_same_command_starts_and_resumes(left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in left:
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / name).touch()
    command = ("train", "--preset", tiny.preset(tmp_path, run__epochs=1), "--out", "new", "--resume")
    for _ in range(2):
        outcome = tdpo(*command)
        assert outcome.status == 0, outcome.err
    assert len(tiny.rows(tmp_path / "new")) == 1 and "all 1 epochs are done" in outcome.err
    assert "no run there" in refused("train", "--out", "other", "--resume")


# --- the terminal and the command line ------------------------------------------------------------------------------------------
def test_nothing_acts_on_the_terminal(capsys):
    assert printable("a\x1b[31m\x9b1\u202eb\nc\td\ud800") == "a\\x1b[31m\\x9b1\\u202eb\nc\td\\ud800"
    assert len(printable("x" * 100_000)) < 2100
    console = Console()
    console.say("one\x1b[2J")
    console.table(["na[/]me"], [["[/].py:f"], ["[red]x"]], title="[b]")
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown and "[/].py:f" in shown and "[red]x" in shown and "na[/]me" in shown


@pytest.mark.slow
def test_names_of_a_preset_are_shown_without_escapes_and_short(tmp_path):
    (tmp_path / "it.json").write_text(json.dumps({"run": {"\x1b[31m" + "x" * 20_000: 1}}))
    message = refused("train", "--preset", tmp_path / "it.json")
    assert "\x1b" not in message and len(message) < 300


@pytest.mark.parametrize("arguments", [["train", "--out", "\udcff"], ["sample", "base", "a \udcff"]])
def test_an_argument_that_is_not_text_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not UTF-8 text" in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [["sample", "LONG", "a cat"], ["report", "LONG"], ["report", "/dev/null"], ["export", "LONG", "--format", "kohya"], ["train", "--out", "LONG"]],
)
def test_a_path_that_no_file_can_have_is_refused(command):
    assert refused(*("x" * 300 if word == "LONG" else word for word in command))


@pytest.mark.parametrize(
    "setting", ["model.base=./nowhere", "model.start_from=nowhere", "reward.train=nowhere.py:f", "rollout.eval_prompts=nowhere.txt"]
)
def test_a_dry_run_checks_what_it_names(setting):
    assert "nowhere" in refused("train", "--dry-run", "--set", setting)


def test_an_empty_preset_name_is_not_the_default():
    assert "unknown preset ''" in refused("train", "--preset", "")


def test_processes_without_numbers_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "abc"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="WORLD_SIZE=abc: expected a whole number"):
        launch.check_environment()


@pytest.mark.parametrize(
    "address",
    ["http://user:SECRET@host/x", "HTTP://SECRET@host/x", "http://u:SECRET@host:99999/x", "https://u:SECRET@[bad/x", "http://u:SEC/RET@host/x"],
)
def test_a_password_in_an_address_is_neither_written_nor_printed(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    (tmp_path / "p.toml").write_text(f'[reward]\nwatch = ["{address}"]\n')
    (tmp_path / "m.toml").write_text(f'[reward.checkpoints]\n"{address}" = "x"\n')
    for command in (
        ("score", "pictures", "--rewards", address), ("train", "--preset", "quickstart", "--set", f"reward.train={address}", "--out", "run"),
        ("train", "--preset", "p.toml", "--out", "run"), ("presets", "p.toml"), ("presets", "m.toml"), ("cross-eval", "base", "--rewards", address),
        ("serve", address),
    ):  # fmt: skip
        message = refused(*command)
        assert "holds no user or password" in message and "SEC" not in message and "RET" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.toml", "p.toml", "pictures"]
    assert printable("no answer from http://user:SECRET@host/x, http://host/model@v2") == "no answer from http://***@host/x, http://host/model@v2"
    assert rewards.check_name("http://host/model@v2") is None


@pytest.mark.parametrize("text", ["abc", "0", "-1", "nan", ""])
def test_a_time_to_wait_that_is_no_number_of_minutes_is_named(text, monkeypatch):
    monkeypatch.setenv("TDPO_TIMEOUT", text)
    message = refused("train", "--preset", "quickstart", "--processes", 2)
    assert message == f"TDPO_TIMEOUT={text}: expected a number of minutes, above 0.\n"


def test_a_port_that_is_taken_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    meet = "another program uses 127.0.0.1:29500, where the processes meet"
    with pytest.raises(WorkError, match=meet) as caught, world._exchange("the first greetings"):
        raise torch.distributed.DistNetworkError("The server socket has failed to listen on any local network address. ... code: -98, EADDRINUSE")
    assert not isinstance(caught.value, LostPeer)


@pytest.mark.slow
def test_a_prompt_is_quoted_where_a_command_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text('"; touch pwned; echo "\n')
    outcome = tdpo(
        "train", "--preset", tiny.preset(tmp_path, run__epochs=1, rollout__prompts="p.txt", reward__train="jpeg-compressibility"), "--out", "new"
    )
    assert """tdpo sample new '"; touch pwned; echo "' --per-prompt 8""" in outcome.err, outcome.err


# --- memory -------------------------------------------------------------------------------------------------------------------
def test_the_plan_of_a_cpu_fits_the_memory_that_is_there():
    preset = presets.load("hpsv2")
    free = 64 * 10**9
    plan = memory.choose(preset, memory.limit(preset, free, gpu=False), gpu=False)
    assert plan != memory.CPU_LADDER[0] and memory.estimate(preset, 1, plan, gpu=False) < free
    smallest = memory.choose(preset, memory.limit(preset, 10**9, gpu=False), gpu=False)
    assert memory.estimate(preset, 1, smallest, gpu=False) == min(memory.estimate(preset, 1, one, gpu=False) for one in memory.CPU_LADDER)
