"""Facts about runs on a flow-matching model: resumed and shared runs are the same run, and every command takes what they leave."""

import json

import pytest
import tiny
from helpers import tdpo

CHANGES = {
    "model__base": "sandbox-flow", "rollout__steps": 3, "rollout__guidance_scale": 3.0, "rollout__eval_prompts": "sandbox:held-out",
    "reward__train": "aesthetic", "reward__watch": ["gold"], "run__epochs": 2,
}  # fmt: skip
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    tiny.preset(folder, **CHANGES)
    return folder


@pytest.fixture(scope="module")
def run(place):
    outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", place / "straight")
    assert outcome.status == 0, outcome.err
    return place / "straight"


@pytest.mark.slow
def test_a_resumed_flow_run_equals_the_straight_run(run, place):
    assert tdpo("train", "--preset", place / "tiny.toml", "--out", place / "halves", "--epochs", 1).status == 0
    assert tdpo("train", "--resume", "--out", place / "halves", "--epochs", 2).status == 0
    assert tiny.outcome_of(place / "halves") == tiny.outcome_of(run)


@pytest.mark.slow
def test_a_flow_run_trains_the_steps_with_noise(run):
    first, last = tiny.rows(run)
    assert (first["updates"], last["updates"]) == (4, 8)  # 2 of 3 steps, 2 batches
    assert first["ratio_drift"] == 0 and len(first["steps/ratio_mean"]) == 2
    preset = json.loads((run / "preset.json").read_text())
    assert preset["algorithm"]["critic_state"] == "x0" and preset["rollout"]["dynamics"] == "flow-sde"


@pytest.mark.slow
def test_every_command_takes_a_flow_run(run, place):
    sample = tdpo("sample", run, PROMPT, "--per-prompt", 2, "--out", place / "samples")
    assert sample.status == 0, sample.err
    assert len(list((place / "samples").glob("0*.png"))) == 2
    judged = tdpo("cross-eval", run, "--rewards", "aesthetic,gold", "--per-prompt", 1, "--out", place / "judged")
    assert judged.status == 0, judged.err
    assert (place / "judged" / "cross_eval.json").is_file()
    assert tdpo("report", run, "--out", place / "page.html").status == 0
    assert "sandbox-flow" in (place / "page.html").read_text()


@pytest.mark.slow
def test_kohya_export_of_a_flow_run_says_what_works_instead(run, place):
    refused = tdpo("export", run, "--format", "kohya", "--out", place / "kohya.safetensors")
    assert refused.status == 2 and "transformer's" in refused.err and "ComfyUI and diffusers read it " in refused.err


@pytest.mark.slow
def test_the_model_card_of_a_flow_run_loads_it(run, place, monkeypatch):
    (checkpoint,) = [folder for folder in (run / "checkpoints").iterdir() if folder.name.endswith("1")]
    card = (checkpoint / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "text_encoder_3=None, tokenizer_3=None" in code
    monkeypatch.chdir(checkpoint)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (32, 32)
