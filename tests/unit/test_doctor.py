"""tdpo doctor: what is here, what is missing with the command that fetches it, and whether a preset could run."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import make_preset, tdpo

from tdpo_cli import doctor
from tdpo_cli.console import Console
from tdpo_cli.errors import WorkError
from tdpo_cli.rewards import required_files
from tdpo_cli.sandbox import ZOO


def cached(monkeypatch, *names):
    """A hub cache that holds just these (hub id, file)."""
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda hub_id, name, **options: f"/cache/{name}" if (hub_id, name) in names else None
    )


def test_quickstart_could_run_here():
    result = tdpo("doctor", "--json")
    report = json.loads(result.out)
    assert report["preset"]["present"] and report["preset"]["fits"], report["problems"]
    assert result.status == (0 if report["ok"] else 1)
    assert report["devices"][0]["device"] == "cpu" and report["libraries"]["torch"]["ok"] and report["free_disk_bytes"] > 0
    assert set(report["rewards"]) == {"aesthetic", "pickscore", "hpsv2", "hpsv2.1", "imagereward"}


def test_published_preset_lists_what_is_missing(monkeypatch):
    cached(monkeypatch, ("xswu/HPSv2", "HPS_v2_compressed.pt"))
    result = tdpo("doctor", "--preset", "hpsv2")
    assert result.status == 1 and "files of hpsv2 are missing" in result.err
    report = json.loads(tdpo("doctor", "--preset", "hpsv2", "--json").out)
    assert report["rewards"]["hpsv2"]["present"] and not report["rewards"]["hpsv2.1"]["present"]
    assert report["rewards"]["hpsv2.1"]["commands"] == ["hf download xswu/HPSv2 HPS_v2.1_compressed.pt"]
    commands = report["preset"]["commands"]
    assert commands[0].startswith("hf download CompVis/stable-diffusion-v1-4 unet/config.json unet/diffusion_pytorch_model.safetensors")
    assert commands[-1] == "hf download zhwang/HPDv2 benchmark/photo.json benchmark/paintings.json --repo-type dataset"


def test_unknown_preset_is_refused():
    result = tdpo("doctor", "--preset", "hpvs2")
    assert result.status == 2 and "hpsv2" in result.err


@pytest.mark.parametrize("reward", ["aesthetic", "pickscore", "hpsv2", "imagereward"])
def test_sandbox_checkpoints_are_whole(reward):
    assert all(file.path for file in required_files.of_reward(reward, str(ZOO / reward)))


def test_local_folder_names_where_its_files_belong(tmp_path):
    (tmp_path / "ImageReward.pt").touch()
    files = required_files.of_reward("imagereward", str(tmp_path))
    assert [file.path is None for file in files] == [False, True, True]
    assert required_files.commands(files) == [
        f"hf download THUDM/ImageReward med_config.json --local-dir {tmp_path}",
        f"hf download google-bert/bert-base-uncased vocab.txt --local-dir {tmp_path}",
    ]


def test_half_precision_weights_of_a_base_model_count(monkeypatch):
    cached(monkeypatch, ("a/b", "unet/diffusion_pytorch_model.fp16.safetensors"), ("a/b", "text_encoder/pytorch_model.bin"))
    here = [file.name for file in doctor._base_model(make_preset(model__base="a/b")) if file.path]
    assert here == ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/pytorch_model.bin"]


@pytest.mark.slow
def test_missing_index_of_a_local_model_is_named(tmp_path):
    folder = Path(shutil.copytree(ZOO / "pipeline", tmp_path / "model"))
    named = lambda: [file.name for file in doctor._base_model(make_preset(model__base=str(folder))) if file.path is None]
    assert named() == []
    (folder / "model_index.json").unlink()
    assert named() == ["model_index.json"]
    (tmp_path / "mine.toml").write_text(f'[model]\nbase = "{folder}"\n[reward]\nzoo = "sandbox"\n')
    result = tdpo("doctor", "--preset", tmp_path / "mine.toml")
    assert result.status == 1 and "are missing: model_index.json" in result.err


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_main_memory", lambda: (2_000_000_000, 1_000_000))
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    result = tdpo("doctor")
    assert result.status == 1 and "1.0 MB are free on cpu" in result.err


def test_old_library_is_said(monkeypatch):
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "peft" else version(name))
    result = tdpo("doctor")
    assert result.status == 1 and "peft 0.1, needs >=" in result.err


def test_fetch_runs_the_commands_of_what_is_missing(tmp_path, monkeypatch):
    said = tmp_path / "said"
    (tmp_path / "hf").write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    (tmp_path / "hf").chmod(0o755)
    monkeypatch.setattr(doctor, "HF", str(tmp_path / "hf"))
    files = [required_files.File("a.bin", "owner/name", None, "owner/name", " --revision main"), required_files.File("here", "o/n", "/here", "o/n")]
    doctor.download(files, Console(quiet=True))
    assert said.read_text() == "download owner/name a.bin --revision main\n"
    (tmp_path / "hf").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(WorkError, match="hf auth login"):
        doctor.download(files, Console(quiet=True))


def test_flow_model_that_is_not_here_is_fetched_by_its_own_parts(monkeypatch):
    cached(monkeypatch)
    files = doctor._base_model(make_preset(model__base="black-forest-labs/FLUX.1-dev"))
    parts = "vae/ text_encoder/ text_encoder_2/ transformer/ tokenizer/ tokenizer_2/ scheduler/ model_index.json"
    assert required_files.commands(files) == [f"hf download black-forest-labs/FLUX.1-dev {parts}"]


def test_without_a_gpu_the_cards_are_said(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    result = tdpo("doctor", "--preset", "flux-grpo-pickscore")
    assert [f"{card} GB card" in result.err for card in (16, 24, 48, 80)] == [True] * 4
    assert not json.loads(tdpo("doctor", "--json").out)["preset"]["cards"]  # the sandbox needs none
