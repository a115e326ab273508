"""Facts about `tdpo cross-eval`: on a tiny run through the real command line, and on made-up scores."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import tdpo
from PIL import Image
from safetensors.torch import load_file, save_file

from tdpo_cli.config import prompts
from tdpo_cli.console import Console
from tdpo_cli.cross_eval import result
from tdpo_cli.cross_eval.candidates import Model, Sampling
from tdpo_cli.cross_eval.folder import Folder
from tdpo_cli.errors import RequestError
from tdpo_cli.models.checkpoints import Checkpoint
from tdpo_cli.overoptimisation import statistics
from tdpo_cli.report import cross_eval_page as page
from tdpo_cli.report import cross_eval_tables as tables
from tdpo_cli.report import png
from tdpo_cli.storage.run_dir import damage

PROMPTS = prompts.load("sandbox:held-out")[:5]
REWARDS = ["aesthetic", "gold", "pickscore"]
LORA = "pytorch_lora_weights.safetensors"
# two images a prompt, four at once: three parts a model
QUICK = ("--rewards", ",".join(REWARDS), "--per-prompt", 2, "--batch-size", 4, "--seed", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross-eval")
    tiny.preset(
        folder, rollout__eval_prompts="held-out.txt", reward__train="aesthetic", reward__watch=["gold", "pickscore"], algorithm__name="ddpo",
        update__batch_size=4, update__learning_rate=2e-2, run__epochs=2,  # a rate so high that two epochs show in the images
    )  # fmt: skip
    (folder / "held-out.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(place, monkeypatch):
    """Where held-out.txt lies."""
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def train(place):
    def run(name, *arguments):
        before = os.getcwd()
        os.chdir(place)
        try:
            outcome = tdpo("train", "--preset", "tiny.toml", "--out", place / name, *arguments)
        finally:
            os.chdir(before)
        assert outcome.status == 0, outcome.err
        return place / name

    return run


@pytest.fixture(scope="module")
def run(train):
    """Two epochs of DDPO; the tests only read it."""
    return train("run")


@pytest.fixture(scope="module")
def evaluated(run, place):
    """The evaluation that others are compared with; the tests only read it."""
    before = os.getcwd()
    os.chdir(place)
    try:
        outcome = tdpo("cross-eval", run, *QUICK, "--out", place / "evaluated", "--json")
    finally:
        os.chdir(before)
    assert outcome.status == 0 and outcome.err == "", outcome.err
    assert json.loads(outcome.out)["models"] == ["base", "run/epoch_0000", "run/epoch_0001"]
    return place / "evaluated"


def content(folder):
    return json.loads((folder / "cross_eval.json").read_text())


def model_of(folder, name):
    return next(model for model in content(folder)["models"] if model["name"] == name)


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def refused(*arguments):
    outcome = tdpo("cross-eval", *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("tdpo: ") and outcome.err.count("\n") == 1
    return outcome.err


# --- what is written ------------------------------------------------------------------------------------------------------
def test_the_folder_holds_the_truth_and_what_is_drawn_from_it(evaluated):
    drawn = {f"cross_eval.{suffix}" for suffix in ("json", "csv", "md", "html", "png")}
    assert {path.name for path in evaluated.iterdir()} == {*drawn, "request.json", "images", ".lock"}
    assert not [path for path in evaluated.rglob("*.tmp")]
    for model in content(evaluated)["models"]:
        assert list(pictures(evaluated / model["images"])) == [f"{p:04d}-{i:02d}.png" for p in range(5) for i in range(2)]


def test_the_json_says_what_was_compared(evaluated):
    found = content(evaluated)
    assert (found["seed"], found["per_prompt"], found["prompt_source"], found["prompts"]) == (3, 2, "held-out.txt", PROMPTS)
    assert found["rewards"] == REWARDS and found["bootstrap"] == {"resamples": statistics.RESAMPLES, "level": 0.95, "unit": "prompt"}
    base, first, last = found["models"]
    assert (base["base"], base["run"], base["epoch"], base["reward_queries"], base["updates"]) == (None, None, None, 0, 0)
    assert (last["base"], last["run"], last["epoch"], last["algorithm"], last["trained_reward"]) == ("base", "run", 1, "ddpo", "aesthetic")
    assert [(model["reward_queries"], model["updates"]) for model in (first, last)] == [(4, 2), (8, 4)]
    (one,) = found["runs"]
    assert (one["run"], one["models"]) == ("run", ["run/epoch_0000", "run/epoch_0001"])
    assert one["verdict"] == {"kind": "no verdict", "sentence": "5 prompts are too few, 10 are needed: no verdict", "since": None}
    assert found["matrix"]["standardised"] == [[last["rewards"][name]["standardised"] for name in REWARDS]]


def test_every_number_follows_from_the_scores(evaluated):
    found = content(evaluated)
    base, _, last = found["models"]
    for name in REWARDS:
        before, after = (np.array(model["scores"][name]) for model in (base, last))
        assert before.shape == (5, 2) and (before != after).any()
        numbers = last["rewards"][name]
        assert (numbers["mean"], numbers["std"]) == (pytest.approx(after.mean()), pytest.approx(after.std()))
        assert numbers["difference"]["mean"] == pytest.approx((after - before).mean())
        assert numbers["standardised"]["mean"] == pytest.approx((after - before).mean() / before.std())
        assert numbers["win_rate"]["mean"] == pytest.approx(((after > before) + 0.5 * (after == before)).mean())
        assert numbers["difference"]["low"] <= numbers["difference"]["mean"] <= numbers["difference"]["high"]
        assert base["rewards"][name]["difference"] is None


@pytest.mark.slow
def test_the_images_score_what_the_json_says(evaluated, place):
    (place / "lines.txt").write_text("\n".join(prompt for prompt in PROMPTS for _ in range(2)))
    for model in content(evaluated)["models"][::2]:
        out = place / f"{model['images'].replace('/', '-')}.jsonl"
        arguments = ["--rewards", ",".join(REWARDS), "--zoo", "sandbox", "--prompts", "lines.txt", "--out", out]
        assert tdpo("score", evaluated / model["images"], *arguments).status == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        for name in REWARDS:
            assert [row[name] for row in rows] == pytest.approx(np.ravel(model["scores"][name]).tolist(), rel=1e-5)


def test_the_csv_has_a_row_per_model_and_reward(evaluated):
    rows = list(csv.DictReader((evaluated / "cross_eval.csv").read_text().splitlines()))
    assert [(row["model"], row["reward"]) for row in rows] == [(model["name"], name) for model in content(evaluated)["models"] for name in REWARDS]
    numbers = model_of(evaluated, "run/epoch_0001")["rewards"]["pickscore"]
    assert float(rows[-1]["standardised_low"]) == numbers["standardised"]["low"] and float(rows[-1]["mean"]) == numbers["mean"]
    assert rows[0]["difference_mean"] == rows[0]["epoch"] == ""


def test_the_markdown_and_the_picture_are_there(evaluated):
    text = (evaluated / "cross_eval.md").read_text()
    assert "**run: ddpo on aesthetic**" in text and "| epoch | aesthetic | gold | pickscore |" in text
    assert Image.open(evaluated / "cross_eval.png").width > 400
    assert "<html" in (evaluated / "cross_eval.html").read_text()


# --- paired ---------------------------------------------------------------------------------------------------------------
def test_the_cards_of_the_checkpoints_get_the_table_and_stay_whole(run, evaluated):
    for epoch in (0, 1):
        folder = run / "checkpoints" / f"epoch_{epoch:04d}"
        difference = model_of(evaluated, f"run/epoch_{epoch:04d}")["rewards"]["pickscore"]["standardised"]["mean"]
        assert f"{difference:+.2f}" in (folder / "README.md").read_text().partition("cross-eval")[2]
        assert damage(folder) is None


@pytest.mark.slow
def test_an_adapter_of_zeros_differs_by_exactly_nothing(run, evaluated, place):
    """The same prompts and noise for everyone: what does not differ in weights does not differ at all."""
    weights = load_file(run / "checkpoints/epoch_0001" / LORA)
    (place / "zero").mkdir()
    save_file({name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()}, place / "zero" / LORA)
    out = place / "of-zero"
    outcome = tdpo("cross-eval", "zero", "--preset", "tiny.toml", *QUICK, "--out", out)
    assert outcome.status == 0, outcome.err
    model = model_of(out, "zero")
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert [model["rewards"][name]["difference"] for name in REWARDS] == [nothing] * 3
    assert [model["rewards"][name]["win_rate"]["mean"] for name in REWARDS] == [0.5] * 3
    assert pictures(out / "images/zero") == pictures(out / "images/base") == pictures(evaluated / "images/base")
    # LoRA weights from anywhere belong to no run
    assert (model["run"], model["epoch"], model["trained_reward"], model["reward_queries"]) == (None, None, None, None)
    (one,) = content(out)["runs"]
    assert (one["run"], one["models"], one["algorithm"]) == ("zero", ["zero"], None)
    assert one["verdict"]["sentence"] == "what it was trained on is not known: no verdict"


@pytest.mark.slow
def test_every_image_has_its_own_noise_and_another_seed_other_images(evaluated, place):
    own = pictures(evaluated / "images/base")
    assert len(set(own.values())) == len(own)
    assert tdpo("cross-eval", "base", "--preset", "tiny.toml", *QUICK[:-1], 4, "--out", place / "seed-4").status == 0
    assert not set(pictures(place / "seed-4/images/base").values()) & set(own.values())


# --- a folder that is damaged, or a stranger's ----------------------------------------------------------------------------
@pytest.fixture
def foreign(evaluated, place):
    """A copy to change; `edit(request)` changes its request.json."""
    folder = place / "foreign"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(evaluated, folder)

    def edit(change):
        file = folder / "request.json"
        request = json.loads(file.read_text())
        change(request)
        file.write_text(json.dumps(request))

    return folder, edit


@pytest.mark.parametrize("name", ["../../elsewhere", "a/../../b", "/tmp/elsewhere", "", "a\nb", 3, None])
def test_a_model_name_that_leaves_the_folder_is_refused(run, foreign, name):
    folder, edit = foreign
    edit(lambda request: request["models"].append({**request["models"][0], "name": name}))
    (folder / "cross_eval.json").unlink()
    message = refused(run, *QUICK, "--out", folder)
    assert "request.json: damaged: " in message and "Choose another --out." in message


@pytest.mark.parametrize("change", [{"models": []}, {"models": [5]}, {"models": None}, {"batch_size": "4"}, {"batch_size": 0}])
def test_a_request_that_is_none_is_refused(run, foreign, change):
    folder, edit = foreign
    edit(lambda request: request.update(change))
    assert "request.json: damaged: " in refused(run, *QUICK, "--out", folder)


@pytest.mark.parametrize("name", ["images", "images/run/epoch_0000", "cross_eval.csv", "request.json"])
def test_nothing_is_written_through_a_link_in_the_folder(run, foreign, place, name):
    folder, _ = foreign
    shutil.move(folder / name, place / "target")
    (folder / name).symlink_to(place / "target")
    before = {path: path.read_bytes() for path in (place / "target").rglob("*.png")}
    assert f"{folder / name}: a link to {place / 'target'}" in refused(run, *QUICK, "--quiet", "--out", folder)
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(place / "target") if (place / "target").is_dir() else (place / "target").unlink()


def test_only_the_cards_of_checkpoints_that_are_named_are_written(run, foreign, place):
    """The folder's own request does not decide what is written."""
    folder, edit = foreign
    other = shutil.copytree(run, place / "other", dirs_exist_ok=True) / "checkpoints/epoch_0001"
    card = (other / "README.md").read_bytes()

    def point_elsewhere(request):
        entry = request["models"][-1]
        request["models"].append({**entry, "name": "third", "sampling": {**entry["sampling"], "start_from": str(other)}})

    edit(point_elsewhere)
    result = content(folder)
    result["models"].append({**result["models"][-1], "name": "third"})
    (folder / "cross_eval.json").write_text(json.dumps(result))
    before = (run / "checkpoints/epoch_0001/README.md").read_bytes()
    assert tdpo("cross-eval", run, *QUICK, "--quiet", "--out", folder).status == 0
    assert (other / "README.md").read_bytes() == card and (run / "checkpoints/epoch_0001/README.md").read_bytes() == before


@pytest.mark.parametrize("change", [{"models": [5]}, {"runs": {"a": 1}}, {"rewards": None}, {"matrix": 3}])
def test_a_result_that_cannot_be_drawn_is_named(run, foreign, change):
    folder, _ = foreign
    (folder / "cross_eval.json").write_text(json.dumps({**content(folder), **change}))
    message = tdpo("cross-eval", run, *QUICK, "--quiet", "--out", folder)
    assert message.status == 2 and "cross_eval.json: damaged: " in message.err and "Traceback" not in message.err


@pytest.mark.parametrize("text", ["{", "[]", '{"scores": {"gold": [[1, 2], [3, 4]]}, "distances": null}', '{"scores": 5, "distances": null}'])
def test_a_damaged_part_is_named(tmp_path, text):
    folder = Folder(tmp_path)
    folder.write_part("base", 0, {"scores": {"a": [[1.0], [None]]}, "distances": [0.5, 0.25]})
    task = {"prompts": ["x", "y"], "rewards": {"a": None}, "per_prompt": 1}
    assert folder.read_parts("base", task, 2)[0]["distances"] == [0.5, 0.25]
    folder.part("base", 0).write_text(text)
    with pytest.raises(RequestError, match="00000.json: damaged: .*Remove it: the same command makes it anew"):
        folder.read_parts("base", task, 2)
    folder.part("base", 0).unlink()
    with pytest.raises(RequestError, match="00000.json: gone"):
        folder.read_parts("base", task, 2)


# --- going on -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_the_same(run, evaluated, place):
    out = place / "killed"
    command = [sys.executable, "-m", "tdpo_cli", "cross-eval", run, *QUICK, "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(list(out.glob("parts/**/*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "cross_eval.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("images/base/*.png")}
    outcome = tdpo("cross-eval", run, *QUICK, "--out", out)
    assert outcome.status == 0 and "parts are there already; continuing" in outcome.err
    assert (out / "cross_eval.json").read_bytes() == (evaluated / "cross_eval.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in done} == done  # what was finished is not done again
    assert not [path for path in out.rglob("*.tmp")] and not (out / "parts").exists()


@pytest.mark.slow
def test_a_finished_evaluation_is_only_drawn_again(run, evaluated):
    before = (evaluated / "cross_eval.json").read_bytes()
    (evaluated / "cross_eval.csv").unlink()
    outcome = tdpo("cross-eval", run, *QUICK[:4], "--seed", 3, "--out", evaluated)  # the batch size may be left out
    assert outcome.status == 0 and "drawn anew" in outcome.err
    assert (evaluated / "cross_eval.json").read_bytes() == before and (evaluated / "cross_eval.csv").exists()


@pytest.mark.slow
def test_a_result_of_an_earlier_version_is_drawn_again(run, evaluated, place):
    """Its verdict is a sentence."""
    older = shutil.copytree(evaluated, place / "older")
    found = content(older)
    found["runs"][0]["verdict"] = sentence = "aesthetic +1.10 sd, others -0.30 sd since epoch 0: over-optimising"
    (older / "cross_eval.json").write_text(json.dumps(found))
    outcome = tdpo("cross-eval", run, *QUICK, "--out", older, "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["verdicts"] == {"run": {"kind": "over-optimising", "sentence": sentence, "since": 0}}
    assert (
        f"- {sentence}\n" in (older / "cross_eval.md").read_text()
        and f'<p class="verdict bad">{sentence}</p>' in (older / "cross_eval.html").read_text()
    )
    assert f"Over the run's checkpoints: {sentence}." in (run / "checkpoints/epoch_0001/README.md").read_text()
    assert tdpo("cross-eval", run, *QUICK, "--out", evaluated, "--quiet").status == 0  # the cards as they were


@pytest.mark.parametrize(
    "arguments, difference",
    [
        (("--seed", 4), "seed is 3, asked for 4"),
        (("--per-prompt", 3), "per_prompt is 2, asked for 3"),
        (("--rewards", "gold"), "rewards is aesthetic,gold,pickscore, asked for gold"),
        (("--batch-size", 2), "batch_size is 4, asked for 2"),
        (("--prompts", "sandbox"), "prompts is 5 entries, asked for 8 entries"),
        (("--epoch", 1), "epochs is [], asked for [1]"),
        (("--set", "rollout.steps=3"), "run/epoch_0001 has other sampling settings now"),
    ],
)
def test_an_evaluation_with_other_arguments_is_refused(run, evaluated, arguments, difference):
    before = (evaluated / "cross_eval.json").read_bytes()
    message = refused(run, *QUICK, *arguments, "--out", evaluated)
    assert difference in message and "Choose another --out." in message
    assert (evaluated / "cross_eval.json").read_bytes() == before


@pytest.fixture
def growing(run, evaluated, place):
    """A run that has its first checkpoint only, evaluated; a second one comes later."""
    folder = place / "growing"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    shutil.move(folder / "checkpoints/epoch_0001", folder / "later")
    shutil.rmtree(place / "of-growing", ignore_errors=True)
    assert tdpo("cross-eval", folder, *QUICK, "--out", place / "of-growing").status == 0
    return folder


@pytest.mark.slow
def test_a_run_that_goes_on_is_evaluated_as_far_as_it_was(growing, evaluated, place):
    before = (place / "of-growing/cross_eval.json").read_bytes()
    assert [model["name"] for model in content(place / "of-growing")["models"]] == ["base", "growing/epoch_0000"]
    shutil.move(growing / "later", growing / "checkpoints/epoch_0001")
    outcome = tdpo("cross-eval", growing, *QUICK, "--out", place / "of-growing")
    assert outcome.status == 0 and "begun with 2 of now 3 models" in outcome.err
    assert (place / "of-growing/cross_eval.json").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_or_changed_stops_an_unfinished_evaluation(growing, place):
    (place / "of-growing/cross_eval.json").unlink()
    shutil.move(growing / "later", growing / "checkpoints/epoch_0001")
    shutil.rmtree(growing / "checkpoints/epoch_0000")
    assert "epoch_0000 is gone (a run with run.keep_last removes" in refused(growing, *QUICK, "--quiet", "--out", place / "of-growing")
    shutil.copytree(growing / "checkpoints/epoch_0001", growing / "checkpoints/epoch_0000")
    manifest = growing / "checkpoints/epoch_0000/manifest.json"
    manifest.write_text(manifest.read_text().replace('"epoch": 1', '"epoch": 0'))
    assert "growing/epoch_0000 has other weights now" in refused(growing, *QUICK, "--quiet", "--out", place / "of-growing")


# --- what may be compared -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_runs_of_one_name_share_the_base_and_keep_apart(run, evaluated, place):
    shutil.copytree(run, place / "copies/run")
    out = place / "two"
    outcome = tdpo("cross-eval", run, "copies/run", "copies/run/checkpoints/epoch_0001", *QUICK, "--epoch", 1, "--out", out)
    assert outcome.status == 2 and "--epoch chooses checkpoints of run folders" in outcome.err
    outcome = tdpo("cross-eval", run, "copies/run", "copies/run/checkpoints/epoch_0001", *QUICK, "--out", out)
    assert outcome.status == 0, outcome.err
    found = content(out)
    names = [f"{place.name}/run", "copies/run"]
    expected = ["base", *(f"{name}/epoch_{epoch:04d}" for name in names for epoch in (0, 1))]
    assert [model["name"] for model in found["models"]] == expected
    assert found["matrix"]["trained"] == names and found["matrix"]["standardised"][0] == found["matrix"]["standardised"][1]
    one, other = (model["scores"] for model in found["models"][2::2])
    assert one == other == model_of(evaluated, "run/epoch_0001")["scores"]
    assert "## Every run's last checkpoint" in (out / "cross_eval.md").read_text()


@pytest.mark.slow
def test_all_rewards_are_the_runs_own_and_the_zoos(run, place):
    out = place / "all"
    outcome = tdpo("cross-eval", run, "--epoch", 1, "--prompts", "held-out.txt", "--per-prompt", 1, "--out", out)
    assert outcome.status == 0, outcome.err
    found = content(out)
    assert found["rewards"] == ["aesthetic", "gold", "pickscore", "hpsv2", "imagereward"]
    assert [model["name"] for model in found["models"]] == ["base", "run/epoch_0001"]
    assert all(model["diversity"] is None and model["agreement"] is None for model in found["models"])  # one image a prompt


@pytest.mark.slow
def test_the_base_model_alone_is_described(place):
    out = place / "base-only"
    outcome = tdpo("cross-eval", "base", "--preset", "tiny.toml", *QUICK, "--out", out)
    assert outcome.status == 0, outcome.err
    found = content(out)
    assert [model["name"] for model in found["models"]] == ["base"] and found["runs"] == found["matrix"]["standardised"] == []
    assert found["models"][0]["diversity"]["mean"] > 0
    assert (out / "cross_eval.png").exists() and "aesthetic" in outcome.err


@pytest.mark.slow
def test_fully_fine_tuned_checkpoints_are_compared_with_the_same_base(train, evaluated, place):
    full = train("full", "--set", "model.lora_rank=0", "--set", "update.learning_rate=1e-3", "--epochs", 1)
    outcome = tdpo("cross-eval", full, *QUICK, "--out", place / "of-full")
    assert outcome.status == 0, outcome.err
    assert model_of(place / "of-full", "base")["scores"] == model_of(evaluated, "base")["scores"]
    assert model_of(place / "of-full", "full/epoch_0000")["rewards"]["aesthetic"]["difference"]["mean"] != 0


@pytest.mark.slow
def test_settings_that_differ_get_a_base_of_their_own(run, place):
    preset = json.loads((run / "preset.json").read_text())
    shutil.copytree(run, place / "slower")
    preset["rollout"]["steps"] = 3
    (place / "slower/preset.json").write_text(json.dumps(preset))
    outcome = tdpo("cross-eval", run, "slower", *QUICK, "--epoch", 1, "--out", place / "two-bases")
    assert outcome.status == 0, outcome.err
    models = {model["name"]: model for model in content(place / "two-bases")["models"]}
    assert list(models)[:2] == ["base", "base-2"] and models["base"]["scores"] != models["base-2"]["scores"]
    assert (models["run/epoch_0001"]["base"], models["slower/epoch_0001"]["base"]) == ("base", "base-2")
    first, second = (models[name]["agreement"]["base"]["mean"] for name in ("run/epoch_0001", "slower/epoch_0001"))
    assert first != second  # each is compared with its own


# --- wrong requests -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["./nowhere"], "./nowhere: no such checkpoint, run or model folder"),
        (["RUN", "--rewards", "asthetic"], "unknown reward 'asthetic'. Did you mean aesthetic?"),
        (["RUN", "--rewards", ","], "no reward named; expected all"),
        (["RUN", "--epoch", "7"], "no checkpoint of epoch 7. There are: epoch_0000, epoch_0001."),
        (["base", "--epoch", "7"], "--epoch chooses checkpoints of run folders, and base is none."),
        (["RUN", "--prompts", "none.txt"], "none.txt: no such prompt file."),
        (["RUN", "--set", "rollout.eval_prompts=none"], "rollout.eval_prompts is not set; give held-out prompts with --prompts FILE."),
        (["RUN", "base"], "the runs name different rollout.eval_prompts (held-out.txt, sandbox:held-out); say which with --prompts FILE."),
        (["RUN", "--checkpoint", "pickscore=./nowhere", "--rewards", "pickscore"], "pickscore needs config.json, looked for in nowhere"),
        (["RUN", "OTHER"], "the runs score pickscore with different checkpoints"),
        (["RUN", "--device", "gpu9"], "--device gpu9: not a device"),
        (["RUN", "--gpus", "2", "--processes", "2"], "--gpus and --processes exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_leaves_nothing(arguments, message, run, place):
    if "OTHER" in arguments:
        shutil.copytree(run, place / "other-zoo")
        preset = json.loads((run / "preset.json").read_text())
        preset["reward"]["checkpoints"] = {"pickscore": "some/where-else"}
        (place / "other-zoo/preset.json").write_text(json.dumps(preset))
    words = {"RUN": run, "OTHER": place / "other-zoo"}
    assert message in refused(*(words.get(word, word) for word in arguments), "--out", place / "refused")
    assert not (place / "refused").exists()


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have_is_refused_before_anything_is_written(run, place):
    outcome = tdpo("cross-eval", run, "nowhere/model", "--prompts", "held-out.txt", "--rewards", "gold", "--out", place / "refused")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("tdpo: nowhere/model: no such folder, and the hub did not give it") and not (place / "refused").exists()


def test_a_folder_with_other_things_is_left_alone(run, place):
    (place / "mine").mkdir()
    (place / "mine/thesis.txt").write_text("years of work")
    assert "mine holds other things; choose another --out." in refused(run, *QUICK, "--out", "mine")
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_default_folder_counts_up(run, place):
    for number in (1, 2):
        assert tdpo("cross-eval", run / "checkpoints/epoch_0000", "--rewards", "gold", "--quiet").status == 0
        assert (place / f"cross-evals/run-epoch_0000-000{number}/cross_eval.json").exists()


# --- made-up scores -------------------------------------------------------------------------------------------------------
def made_up(gold=0.0, missing=False, runs=("one", "two")):
    """A result of 12 prompts: per run three checkpoints; aesthetic rises throughout, the others fall after the second."""
    sampling = Sampling(Checkpoint("sandbox", None, "fp32", None), 2, 1.0, 1.0, "")
    models = [Model("base", None, None, None, None, None, None, 0, 0, sampling, {})]
    parts = {"base": [_part(0, 0, 0, 0)]}
    for run in runs:
        for step, (aesthetic, other) in enumerate([(1, 1), (2, 2), (3, 0.5)]):
            name = f"{run}/epoch_{step:04d}"
            models.append(Model(name, "base", run, step, run, "tdpo", "aesthetic", 8 * (step + 1), step + 1, sampling, {}))
            parts[name] = [_part(aesthetic, other, other, gold * (step + 1))]
    if missing:
        parts["one/epoch_0002"][0]["scores"]["hpsv2"][4] = [None, None]
    rewards = dict.fromkeys(["aesthetic", "gold", "pickscore", "hpsv2", "imagereward"])
    request = {"rewards": rewards, "prompts": [f"prompt {p}" for p in range(12)], "seed": 0, "per_prompt": 2, "prompt_source": "made up"}
    return result.build(request, models, parts)


def _part(aesthetic, pickscore, hpsv2, gold):
    noise = np.random.default_rng(7).normal(size=(5, 12, 2))
    noise[1] *= 1 + gold  # ranks images otherwise: who reads it shows
    more = np.random.default_rng(int(10 * aesthetic) + 1).normal(size=(5, 12, 2)) * 0.1
    shift = np.array([aesthetic, gold, pickscore, hpsv2, pickscore]).reshape(5, 1, 1)
    names = ["aesthetic", "gold", "pickscore", "hpsv2", "imagereward"]
    return {"scores": {name: values.tolist() for name, values in zip(names, noise + shift + more, strict=True)}, "distances": [0.1] * 12}


def test_the_verdict_names_the_epoch_after_which_the_others_fell():
    found = made_up()["runs"][0]
    assert found["verdict"]["sentence"].endswith("since epoch 1: over-optimising")
    assert (found["verdict"]["kind"], found["verdict"]["since"]) == ("over-optimising", 1)
    assert found["since_best"]["epoch"] == 1 and found["since_best"]["others"]["mean"] < -1
    assert found["peak_to_final"]["pickscore"]["peak_epoch"] == 1
    drop = found["peak_to_final"]["pickscore"]
    assert drop["drop"]["mean"] == pytest.approx(drop["peak"] - drop["final"])


def test_gold_is_shown_and_judges_nothing():
    one, other = made_up(gold=5.0), made_up(gold=-5.0)
    assert one["models"][-1]["rewards"]["gold"] != other["models"][-1]["rewards"]["gold"]
    for key in ("verdict", "since_base", "since_best"):
        assert [run[key] for run in one["runs"]] == [run[key] for run in other["runs"]]
    for key in ("prompts_all_rise", "prompts_trained_rises_others_fall", "agreement"):
        assert [model[key] for model in one["models"]] == [model[key] for model in other["models"]]


def test_agreement_stands_with_every_checkpoint():
    found = made_up()
    base, last = found["models"][0], found["models"][3]
    assert base["agreement"] is None and set(last["agreement"]) == {"base", "model", "change"}
    assert last["agreement"]["change"]["mean"] == pytest.approx(last["agreement"]["model"]["mean"] - last["agreement"]["base"]["mean"])
    assert last["agreement"]["change"]["mean"] != 0


def test_a_result_without_agreement_is_still_drawn(capsys):
    """As earlier versions wrote them."""
    found = made_up()
    for model in found["models"]:
        del model["agreement"]
    assert "| 2 | 100% | 100% |" in tables.as_markdown(found)
    assert "<h2>" in page.render(found, Path("nowhere"))


def test_a_missing_score_is_null_and_its_pair_is_left_out():
    found = made_up(missing=True)
    json.dumps(found, allow_nan=False)
    model = next(model for model in found["models"] if model["name"] == "one/epoch_0002")
    whole = next(model for model in made_up()["models"] if model["name"] == "one/epoch_0002")
    assert model["scores"]["hpsv2"][4] == [None, None]
    base = np.array(found["models"][0]["scores"]["hpsv2"])
    kept = [p for p in range(12) if p != 4]
    difference = (np.array(whole["scores"]["hpsv2"]) - base)[kept]
    assert model["rewards"]["hpsv2"]["difference"]["mean"] == pytest.approx(difference.mean())
    assert model["rewards"]["aesthetic"] == whole["rewards"]["aesthetic"]


@pytest.mark.parametrize("runs", [("one",), ("one", "quickstart-0002")])
def test_the_terminal_shows_last_checkpoints_with_their_intervals_in_80_columns(runs, capsys):
    console = Console()
    console.rich.width = 80
    found = made_up(runs=runs)
    tables.show(found, console)
    said = capsys.readouterr().err
    assert max(len(line) for line in said.splitlines() if not line.startswith("  ")) <= 80  # sentences wrap by themselves
    for run in found["runs"]:
        last = next(model for model in found["models"] if model["name"] == run["models"][-1])
        assert f"{run['run']}: " in said and all(tables.interval(cell["standardised"]) in said for cell in last["rewards"].values())


@pytest.mark.slow
def test_the_picture_has_a_chart_per_run_in_the_page_s_colours(tmp_path):
    for name, runs in (("one.png", ("one",)), ("two.png", ("one", "two"))):
        (tmp_path / name).write_bytes(png.cross_eval(made_up(runs=runs)))
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.size == (one.width, 2 * one.height)
    colours = dict((colour, count) for count, colour in two.getcolors(1 << 24))
    assert colours[(11, 98, 196)] > 1.8 * dict((colour, count) for count, colour in one.getcolors(1 << 24))[(11, 98, 196)] > 1000  # trained


def test_what_took_part_in_training_judges_no_checkpoint():
    from types import SimpleNamespace

    import numpy as np

    from tdpo_cli.cross_eval.result import _judged

    columns = {name: np.full((1, 2), value) for name, value in {"a": 1.0, "b": 4.0, "held": -1.0, "free": 2.0}.items()}
    several = _judged(columns, SimpleNamespace(weights={"a": 1.0, "b": 0.5}, constraints=["held"], trained_reward="a + 0.5 b"))
    assert {name: column.tolist() for name, column in several.items()} == {"a + 0.5 b": [[2.0, 2.0]], "free": [[2.0, 2.0]]}
    assert _judged(columns, SimpleNamespace(weights={}, constraints=[], trained_reward="a")) is columns
