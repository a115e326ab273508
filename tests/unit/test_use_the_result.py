"""Facts about docs/use-the-result.md: its code runs as it stands, and the images are the ones it promises."""

import ast
import os
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import tdpo
from PIL import Image

TRAINED = """
[rollout]
samples_per_epoch = 4
[reward]
train = "gold"
watch = []
min_count = 1
[algorithm]
name = "ddpo"
[update]
batch_size = 2
learning_rate = 5e-2  # so that one epoch shows
[run]
epochs = 1
preview_images = 0
[model]
base = "sandbox"
dtype = "fp32"
"""
SAMPLING = ["--set", "rollout.prompts=sandbox", "--set", "rollout.steps=10", "--set", "rollout.guidance_scale=3.0", "--set", "reward.zoo=sandbox"]


def blocks(page):
    """Language, whether it is run, and text of every fenced block, in order."""
    return [(language, not mark, text) for language, mark, text in re.findall(r"^```(\w+)( not-run)?\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]


@pytest.fixture(scope="module")
def page(request):
    return (request.config.rootpath / "docs/use-the-result.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory, page):
    """Where the page was followed: with a run of one epoch in place of the quickstart's 25. -> the folder, and every name its code made"""
    folder, names, before = tmp_path_factory.mktemp("use"), {}, os.getcwd()
    os.chdir(folder)
    try:
        with open("tiny.toml", "w") as preset:
            preset.write(TRAINED)
        for name, changes in (("quickstart-0001", []), ("whole-0001", ["--set", "model.lora_rank=0", "--set", "update.learning_rate=1e-3"])):
            outcome = tdpo("train", "--preset", "tiny.toml", "--out", f"runs/{name}", *SAMPLING, *changes)
            assert outcome.status == 0, outcome.err
        for language, run, text in blocks(page.replace("epoch_0024", "epoch_0000")):
            if run and language == "python":
                for statement in ast.parse(text).body:
                    torch.manual_seed(0)  # every image from the same noise, so that they can be compared
                    exec(compile(ast.Module([statement], []), "use-the-result.md", "exec"), names)
            elif run:
                for line in text.splitlines():
                    outcome = tdpo(*shlex.split(line.removeprefix("tdpo ")))
                    assert outcome.status == 0, outcome.err
    finally:
        os.chdir(before)
    return folder, names


def pixels(image):
    return np.asarray(image, dtype=int)


def samples(place, name):
    return np.stack([pixels(Image.open(file)) for file in sorted((place[0] / "samples" / name).glob("0*.png"))])


def base(names):
    return names["StableDiffusionPipeline"].from_pretrained(names["base"])


def draw(names, pipe):
    """The page's call, from the same noise."""
    torch.manual_seed(0)
    return pixels(pipe(names["prompt"], num_inference_steps=10, guidance_scale=3).images[0])


# --- the page itself --------------------------------------------------------------------------------------------------------
def test_every_block_is_python_or_a_command_and_two_are_not_run(page):
    found = blocks(page)
    assert page.count("```") == 2 * len(found)
    assert {language for language, _, _ in found} == {"python", "sh"}
    assert sum(not run for _, run, _ in found) == page.count("*Not run") == 2
    assert all(line.startswith("tdpo ") for language, run, text in found if language == "sh" and run for line in text.splitlines())


def test_what_is_not_run_is_at_least_python_that_names_what_there_is(page):
    import huggingface_hub

    (code,) = [text for language, run, text in blocks(page) if language == "python" and not run]
    imported = [alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert imported and all(hasattr(huggingface_hub, name) for name in imported)


# --- its images -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_off_is_the_base_model_and_half_lies_between(place):
    _, names = place
    on, half, off = (pixels(names[name]) for name in ("image", "half", "off"))
    assert (off == draw(names, base(names))).all()
    assert abs(on - off).max() > 20
    assert 5 < abs(half - off).mean() < abs(on - off).mean()


@pytest.mark.slow
def test_half_strength_is_tdpo_s_lora_scale(place):
    folder, names = place
    pipe = base(names)
    pipe.load_lora_weights(folder / names["checkpoint"])
    pipe.scheduler = names["DDIMScheduler"].from_config(pipe.scheduler.config)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    half = pipe([names["prompt"]] * 2, num_inference_steps=10, guidance_scale=3, eta=0, latents=names["latents"]).images
    arguments = [names["prompt"], "--per-prompt", 2, "--seed", 7, "--eta", 0, "--lora-scale", 0.5, "--out", folder / "samples/half"]
    assert tdpo("sample", folder / "runs/quickstart-0001", *arguments).status == 0
    assert abs(np.stack([pixels(image) for image in half]) - samples(place, "half")).max() <= 1
    assert abs(samples(place, "half") - samples(place, "seven")).max() > 5


@pytest.mark.slow
def test_the_fused_model_is_the_model_with_its_lora(place):
    folder, names = place
    pipe = names["StableDiffusionPipeline"].from_pretrained(folder / "fused")
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    assert abs(draw(names, pipe) - pixels(names["image"])).max() <= 1


@pytest.mark.slow
def test_the_whole_unet_is_the_trained_one(place):
    folder, names = place
    saved = names["StableDiffusionPipeline"].from_pretrained(folder / "whole")
    assert (draw(names, saved) == draw(names, names["whole"])).all()
    assert abs(draw(names, saved) - draw(names, base(names))).max() > 5


@pytest.mark.slow
@pytest.mark.parametrize("images, folder", [("seven", "seven"), ("noisy", "seven-noisy")])
def test_plain_diffusers_repeats_tdpo_sample(place, images, folder):
    _, names = place
    assert abs(np.stack([pixels(image) for image in names[images]]) - samples(place, folder)).max() <= 1


@pytest.mark.slow
def test_noise_between_the_steps_matters(place):
    assert abs(samples(place, "seven") - samples(place, "seven-noisy")).max() > 20
