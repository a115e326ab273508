"""Facts about the sandbox's weights as they ship: genuine layouts, small, and good enough to learn on."""

import json

import pytest
import torch
from safetensors import safe_open

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.sandbox import ZOO, world
from tdpo_cli.sandbox.training import preferences

REWARDS = ("aesthetic", "pickscore", "hpsv2", "imagereward")


@pytest.fixture(scope="module")
def pipeline():
    from tdpo_cli.sandbox.training.unet import load_pipeline

    return load_pipeline(ZOO)


@pytest.fixture(scope="module")
def held_out_pairs():
    return preferences.make_pairs(None, seed=99, n=64, agreement=1.0)


def test_all_weights_together_are_small():
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) <= 15e6


def test_weights_are_half_precision():
    for file in ZOO.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"F16", "I64"}, file


def test_ledger_names_every_part():
    ledger = json.loads((ZOO / "build.json").read_text())
    assert list(ledger) == ["clip", "vae", "unet", *REWARDS, "flow"]
    assert sum(part["cpu_seconds"] for part in ledger.values()) < 3600 + 3600  # an hour, and one for the flow model


def test_tokenizer_has_one_token_per_word_and_needs_only_vocab_and_merges(pipeline):
    folder = ZOO / "pipeline" / "tokenizer"
    needed = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert needed <= {file.name for file in folder.iterdir()}
    for prompt in world.all_prompts():
        assert len(pipeline.tokenizer(prompt).input_ids) == len(prompt.split()) + 2
    longest = max(len(text.split()) for text in world.caption(world.sample_scenes(0, 500)))
    assert longest + 2 <= pipeline.tokenizer.model_max_length


@pytest.mark.slow
def test_autoencoder_keeps_pictures_and_gives_unit_latents(pipeline):
    from tdpo_cli.sandbox.training.vae import measure

    figures = measure(pipeline.vae, torch.Generator().manual_seed(5), n=64)
    assert figures["psnr_db"] > 29
    assert figures["latent_std"] * pipeline.vae.config.scaling_factor == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_samples_follow_their_prompts(pipeline):
    from tdpo_cli.sandbox.training.unet import sample

    prompts = world.held_out_prompts()
    terms = world.gold_terms(sample(pipeline, prompts, seed=1), prompts)
    assert terms["fidelity"].mean() > 0.45  # the build reports what 256 samples give


@pytest.mark.parametrize("name", REWARDS)
def test_reward_prefers_the_better_picture(name, held_out_pairs):
    from importlib import import_module

    scorer = import_module(f"tdpo_cli.sandbox.training.{name}").load_scorer(ZOO)
    figures = preferences.judge(scorer, held_out_pairs)
    assert figures["accuracy_against_gold"] > 0.6
    assert figures["score_std"] > 0


def test_checkpoints_hold_the_published_key_names():
    def keys(path):
        return torch.load(ZOO / path, weights_only=True)

    assert set(keys("aesthetic/sac+logos+ava1-l14-linearMSE.pth")) == {f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in keys("hpsv2/HPS_v2_compressed.pt")["state_dict"]
    names = keys("imagereward/ImageReward.pt")
    for name in (
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.patch_embed.proj.weight",
        "blip.visual_encoder.blocks.0.attn.qkv.weight",
        "blip.visual_encoder.norm.bias",
        "blip.text_encoder.embeddings.position_ids",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "blip.vision_proj.weight",
        "blip.text_proj.bias",
        "mlp.layers.7.bias",
    ):
        assert name in names


@pytest.mark.parametrize("given, shared, threads", [(None, False, 1), ("2", False, 2), ("2", True, 1)])
def test_its_networks_take_one_thread_unless_the_user_says_otherwise(given, shared, threads, monkeypatch):
    """shared: the launcher chose the number, as a worker's share of the cores."""
    if shared:
        monkeypatch.setenv("TDPO_THREADS_SHARED", "1")
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models.load(Model(base="sandbox"), trainable=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
