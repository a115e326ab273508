"""Facts about model cards: the hub reads them, their code runs, their numbers are the run's, and a cross-evaluation may be added."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import make_preset
from huggingface_hub import ModelCard

from tdpo_cli import models
from tdpo_cli.errors import WorkError
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import model_card
from tdpo_cli.report.model_card import add_cross_eval
from tdpo_cli.sandbox import ZOO
from tdpo_cli.storage import run_dir
from tdpo_cli.storage.run_dir import RunDir, damage

PROMPTS = ["a red circle on a blue background", "a `quoted` | prompt\nof two lines", "long " * 60, "four", "five"]


def make_settings(**changes):
    watch = ["gold", "pickscore"]
    return make_preset(
        **{"model__base": "sandbox", "model__lora_rank": 2, "model__dtype": "fp32", "rollout__steps": 3, "reward__watch": watch} | changes
    )


def make_rows(preset, epochs=3, trained=0.5, others=-0.5):
    """Rewards that start at 4 with a spread of 2 and move by so much an epoch."""
    slopes = {name: trained if name == preset.reward.train else others for name in preset.rewards}
    rewards = lambda epoch: {f"rewards/{name}/mean": 4 + slope * epoch for name, slope in slopes.items()}
    spreads = {f"rewards/{name}/std": 2.0 for name in preset.rewards}
    return [{"epoch": epoch, "reward_queries": 256 * (epoch + 1), "updates": 100 * (epoch + 1)} | rewards(epoch) | spreads for epoch in range(epochs)]


def card_of(preset, rows=None, prompts=PROMPTS):
    return model_card.model_card(preset, rows or make_rows(preset), prompts, "unet")


@pytest.fixture(scope="module", params=[2, 0], ids=["LoRA", "whole UNet"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint folder as a run writes it, with weights that differ from the base model's."""
    preset = make_settings(model__lora_rank=request.param)
    policy = models.load(preset.model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            if "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.5 if request.param else 0.02)

    def write(path):
        policy.save(path)
        (path / "README.md").write_text(card_of(preset))

    run = RunDir(tmp_path_factory.mktemp("cards") / "my-run")
    run.start(preset)
    return run.save_checkpoint(2, write, preset.digest(), None)


# --- front matter -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank, kind", [(4, "adapter"), (0, "finetune")])
def test_the_hub_reads_the_front_matter(rank, kind, tmp_path):
    preset = make_settings(model__base="CompVis/stable-diffusion-v1-4", model__lora_rank=rank)
    (tmp_path / "README.md").write_text(card_of(preset))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("diffusers", "text-to-image", "CompVis/stable-diffusion-v1-4")
    assert data.base_model_relation == kind and ("lora" in data.tags) == (rank > 0)
    assert {"text-to-image", "reinforcement-learning", "tdpo", "tdpo-r"} <= set(data.tags) and len(set(data.tags)) == len(data.tags)
    assert data.license is None  # unknown, so not guessed


@pytest.mark.parametrize("base", ["sandbox", "/home/someone/models/sd14", "../models/sd14"])
def test_a_base_that_is_not_on_the_hub_is_no_base_model(base):
    data = ModelCard(card_of(make_settings(model__base=base))).data
    assert data.base_model is None and data.library_name == "diffusers"


# --- loading ----------------------------------------------------------------------------------------------------------------
def code_of(card):
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


@pytest.mark.slow
def test_the_loading_example_makes_the_checkpoint_s_image(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    names = {}
    torch.manual_seed(0)
    exec(compile(code_of((checkpoint / "README.md").read_text()), "README.md", "exec"), names)

    def by_hand(trained):
        unet = {"unet": UNet2DConditionModel.from_pretrained(checkpoint / "unet")} if trained and (checkpoint / "unet").is_dir() else {}
        pipe = StableDiffusionPipeline.from_pretrained(ZOO / "pipeline", **unet)
        if trained and not unet:
            pipe.load_lora_weights(checkpoint)
        torch.manual_seed(0)
        return np.asarray(pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=5).images[0], dtype=int)

    image = np.asarray(names["image"], dtype=int)
    assert (image == by_hand(trained=True)).all()
    assert abs(image - by_hand(trained=False)).max() > 20


def test_the_loading_example_names_what_the_preset_names():
    model = {"model__base": "CompVis/stable-diffusion-v1-4", "model__revision": "v7"}
    code = code_of(card_of(make_settings(**model, rollout__negative_prompt='a "bad" one', rollout__guidance_scale=1.5)))
    compile(code, "README.md", "exec")
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4", revision="v7")' in code
    assert r'negative_prompt="a \"bad\" one", num_inference_steps=3, guidance_scale=1.5)' in code


# --- contents ---------------------------------------------------------------------------------------------------------------
def table_row(card, name):
    (line,) = [line for line in card.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_rewards_are_those_of_the_run():
    preset = make_settings()
    rows = make_rows(preset, epochs=11)
    card = card_of(preset, rows)
    for name, role in (("aesthetic", "trained"), ("gold", "watched, the truth"), ("pickscore", "watched")):
        means = [f"{row[f'rewards/{name}/mean']:.4f}" for row in (rows[0], rows[-1])]
        assert table_row(card, name) == [role, *means, f"{verdict.rise(rows, name):+.2f} sd"]
    assert "epoch 10" in card and f"{rows[-1]['reward_queries']:,} reward queries, {rows[-1]['updates']:,} optimizer steps" in card


def test_a_reward_without_a_mean_is_a_dash():
    rows = make_rows(make_settings())
    rows[-1]["rewards/pickscore/mean"] = None
    assert table_row(card_of(make_settings(), rows), "pickscore") == ["watched", "4.0000", "-", "-"]


def test_the_verdict_is_told_once_there_is_one():
    preset = make_settings()
    early, late = make_rows(preset, epochs=2), make_rows(preset, epochs=30)
    finding = verdict.read(late, preset)
    assert verdict.read(early, preset).kind == "too early" != finding.kind
    assert "Verdict" not in card_of(preset, early)
    assert f"Verdict, by the watched learned rewards: {finding.sentence}." in card_of(preset, late)


def test_prompts_settings_and_sampling_are_told():
    card = card_of(make_settings(run__seed=7, algorithm__name="ddpo", update__learning_rate=3e-4))
    assert "| prompts | 5 of `simple-animals`, as `a red circle on a blue background`, `a 'quoted' \\| prompt of two lines`, `long long" in card
    assert "`four`" in card and "five" not in card
    assert "| seed | 7 |" in card and "| learning rate | 0.0003 |" in card and "| algorithm | ddpo (" in card
    assert "Sampled in training with DDIM, 3 steps, eta 1, guidance scale 5." in card


def test_a_run_that_started_from_weights_says_so():
    assert "| started from | `epoch_0009`, which epoch 0 is |" in card_of(make_settings(model__start_from="runs/before/checkpoints/epoch_0009"))
    assert "started from" not in card_of(make_settings())


def test_of_a_path_only_the_last_part_is_told(tmp_path):
    secret = tmp_path / "secret-project"
    secret.mkdir()
    (secret / "p.txt").write_text("a cat\n")
    card = card_of(make_settings(rollout__prompts=str(secret / "p.txt"), reward__train=f"{secret}/mine.py:pretty"))
    assert "secret-project" not in card
    assert "of `p.txt`" in card and table_row(card, "mine.py:pretty")[0] == "trained"


# --- a cross-evaluation -----------------------------------------------------------------------------------------------------
def estimate(mean):
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}


def make_result(name="my-run/epoch_0002", mean=0.75, run="my-run"):
    of_base = {"mean": 4.0, "std": 2.0, "difference": None, "standardised": None, "win_rate": None}
    of_ours = {"mean": 4 + 2 * mean, "std": 2.0, "difference": estimate(2 * mean), "standardised": estimate(mean), "win_rate": estimate(0.875)}
    lost = {"mean": None, "std": None, "difference": None, "standardised": None, "win_rate": None}
    base = {"name": "base", "base": None, "run": None, "rewards": {"aesthetic": of_base, "gold": of_base}}
    ours = {"name": name, "base": "base", "run": run, "trained_reward": "aesthetic", "rewards": {"aesthetic": of_ours, "gold": lost},
            "diversity_difference": estimate(-0.5)}  # fmt: skip
    return {
        "seed": 3, "per_prompt": 4, "prompt_source": "/home/someone/held-out.txt", "prompts": ["a", "b"], "rewards": ["aesthetic", "gold"],
        "bootstrap": {"level": 0.95}, "models": [base, ours],
        "runs": [{"run": run, "verdict": {"kind": "improving", "sentence": "aesthetic +0.8 sd: improving", "since": None}}],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder with small files in place of weights."""
    run = RunDir(tmp_path / "my-run")
    preset = make_settings()
    run.start(preset)

    def write(path):
        (path / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
        (path / "README.md").write_text(card_of(preset))

    return run.save_checkpoint(2, write, preset.digest(), None)


def test_a_cross_evaluation_is_put_into_the_card_and_the_checkpoint_stays_whole(folder):
    card, manifest = (folder / "README.md").read_text(), json.loads((folder / "manifest.json").read_text())
    assert add_cross_eval(folder, make_result()) is None
    after = (folder / "README.md").read_text()
    assert after.startswith(card.rstrip()) and "## Cross-evaluation" in after
    assert "2 prompts of `held-out.txt`, 4 images each from the same noise as the base model's, seed 3." in after and "95 % intervals" in after
    assert "| `aesthetic` | trained | 4.0000 | 5.5000 | +0.75 [+0.62, +0.88] | 88% |" in after
    assert "| `gold` |  | 4.0000 | - | - | - |" in after
    assert "Diversity against the base model: -0.5000 [-0.6250, -0.3750]." in after
    assert "Over the run's checkpoints: aesthetic +0.8 sd: improving." in after
    assert damage(folder) is None and ModelCard(after).data.library_name == "diffusers"
    now = json.loads((folder / "manifest.json").read_text())
    changed = {name for name in now["files"] if now["files"][name] != manifest["files"][name]}
    assert changed == {"README.md"} and {**now, "files": 0} == {**manifest, "files": 0}


def test_a_later_cross_evaluation_replaces_the_one_before(folder):
    add_cross_eval(folder, make_result(mean=0.75))
    once = (folder / "README.md").read_bytes()
    add_cross_eval(folder, make_result(mean=-2.0))
    replaced = (folder / "README.md").read_text()
    assert replaced.count("## Cross-evaluation") == 1 and "-2.00 [-2.12, -1.88]" in replaced and "+0.75" not in replaced
    add_cross_eval(folder, make_result(mean=0.75))
    assert (folder / "README.md").read_bytes() == once and damage(folder) is None


def test_words_of_the_user_behind_the_table_stay(folder):
    add_cross_eval(folder, make_result())
    with open(folder / "README.md", "a") as card:
        card.write("\n## Notes\n\nMine.\n")
    for mean in (0.5, 0.25):
        add_cross_eval(folder, make_result(mean=mean))
    card = (folder / "README.md").read_text()
    assert card.endswith(f"{model_card.END}\n\n## Notes\n\nMine.\n") and card.count("Mine.") == 1 and "+0.25" in card


@pytest.mark.parametrize("name, run", [("elsewhere/my-run/epoch_0002", "elsewhere/my-run"), ("my-run/epoch_0002", "my-run")])
def test_the_checkpoint_is_found_by_its_run_and_epoch(folder, name, run):
    assert add_cross_eval(folder, make_result(name, run=run)) is None


def test_a_checkpoint_that_was_not_evaluated_keeps_its_card(folder):
    before = (folder / "README.md").read_bytes()
    assert "not among the models" in add_cross_eval(folder, make_result("my-run/epoch_0009"))
    assert "not among the models" in add_cross_eval(folder, make_result("not-my-run/epoch_0002", run="not-my-run"))
    twice = make_result()
    twice["models"].append({**twice["models"][1], "name": "other/my-run/epoch_0002"})
    assert "not among the models" in add_cross_eval(folder, twice)
    assert (folder / "README.md").read_bytes() == before
    assert add_cross_eval(folder, twice, name="my-run/epoch_0002") is None


def test_a_checkpoint_without_a_card_is_no_error(folder):
    (folder / "README.md").unlink()
    assert "its model card stays without the cross-evaluation" in add_cross_eval(folder, make_result())


def test_stopped_between_card_and_manifest_the_next_evaluation_mends_it(folder, monkeypatch):
    real = run_dir.disk.write_text

    def fails_at_the_manifest(path, text):
        if path.name == "manifest.json":
            raise WorkError("the disk is full")
        real(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(run_dir.disk, "write_text", fails_at_the_manifest)
        assert "the disk is full" in add_cross_eval(folder, make_result())
    assert "README.md is damaged" in damage(folder)
    assert add_cross_eval(folder, make_result()) is None and damage(folder) is None
