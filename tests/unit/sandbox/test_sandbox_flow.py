"""Facts about the flow sandbox: small, in genuine layout, the pipeline that diffusers makes of it, and good enough to learn on."""

import json

import pytest
import torch
from helpers import tdpo

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.models.zero_tokens import merge_zeros
from tdpo_cli.sampling.generate import denoise
from tdpo_cli.sandbox import EMBEDDED, ZOO, is_embedded, world
from tdpo_cli.sandbox.training import flow

PROMPTS = ["a red circle on a blue background", "a green cross on a tan background"]


@pytest.fixture(scope="module")
def policy():
    return models.load(Model(base="sandbox-flow", dtype="fp32"), trainable=False)


def test_the_words_of_embedded_models_are_their_folders():
    assert {name: models.pipeline_class(name, models.index(models.resolve(name))) for name in EMBEDDED} == {
        "sandbox": "StableDiffusionPipeline", "sandbox-flow": "StableDiffusion3Pipeline",
    }  # fmt: skip
    assert is_embedded("sandbox-flow") and not is_embedded("./sandbox-flow") and models.resolve("./sandbox-flow") == "./sandbox-flow"


def test_its_folder_is_small_and_lists_what_it_has():
    folder = ZOO / "flow"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6e6
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name for name, entry in index.items() if isinstance(entry, list) and entry[-1] is not None}
    assert parts == {path.name for path in folder.iterdir() if path.is_dir()}
    assert {name for name, entry in index.items() if isinstance(entry, list)} - parts == {*models.T5, "image_encoder", "feature_extractor"}


@pytest.mark.slow
def test_without_noise_it_draws_what_the_pipeline_draws(policy):
    """The pipeline computes with 256 tokens of zeros, the policy with one that counts 256 times."""
    pipeline = flow.load_flow(ZOO)
    start = torch.randn(len(PROMPTS), *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    wanted = pipeline(PROMPTS, latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    shown = policy.scheduled(4)
    with torch.inference_mode():
        *_, last = denoise(shown, shown.encode(PROMPTS), torch.arange(len(PROMPTS)), start, lambda k: torch.zeros_like(start), 3.0)
        images = shown.decode(last[-1])
    torch.testing.assert_close(images, wanted, atol=2e-5, rtol=0)
    assert (wanted[0] - wanted[1]).abs().max() > 0.2


@pytest.mark.slow
def test_half_precision_keeps_the_zeros_apart(policy):
    """The logarithm of their number is not exact there."""
    sorts = lambda one: {type(block.attn.processor).__name__ for block in one.family.network.transformer_blocks}
    assert sorts(policy) == {"CountedLast"}
    from tdpo_cli.models.families.sd3 import StableDiffusion3

    half = StableDiffusion3.load(models.resolve("sandbox-flow"), Model(), torch.float16, torch.device("cpu"))
    assert {type(block.attn.processor).__name__ for block in half.network.transformer_blocks} == {"JointAttnProcessor2_0"}


def test_a_dry_run_counts_it_as_small():
    report = json.loads(tdpo("train", "--preset", "quickstart-flow", "--dry-run", "--json").out)
    assert report["preset"]["model"]["base"] == "sandbox-flow" and report["preset"]["algorithm"]["critic_state"] == "x0"
    assert report["peak_memory_bytes"] < 2e9 < json.loads(tdpo("train", "--preset", "pickscore", "--dry-run", "--json").out)["peak_memory_bytes"]


@pytest.mark.slow
def test_samples_follow_their_prompts():
    pipeline = flow.load_flow(ZOO)
    merge_zeros(pipeline.transformer, pipeline.tokenizer_max_length)
    prompts = world.held_out_prompts()
    terms = world.gold_terms(flow.sample_flow(pipeline, prompts, seed=1), prompts)
    assert terms["fidelity"].mean() > 0.55  # the build reports what 256 samples give
