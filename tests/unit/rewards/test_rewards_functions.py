"""Rewards without weights: JPEG sizes, the sandbox's gold, and a user's own functions."""

import math

import pytest
import torch

from tdpo_cli import rewards
from tdpo_cli.errors import RewardError
from tdpo_cli.rewards.backbones import Backbones

torch.set_num_threads(1)
FLAT, NOISY = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))

MODULE = """
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def length(images, prompts):
    return [len(p) for p in prompts]

def nested(images, prompts):
    return torch.tensor([float(len(images)) for _ in [p for p in prompts]])

def told(images, prompts):
    return [float(len(p)) for p in prompts]
told.needs_prompt = False

def pixels(images, prompts):
    return images

def words(images, prompts):
    return "a lot"

def undefined(images, prompts):
    return images.mean(dim=(1, 2, 3)) * float("nan")

NUMBER = 3
"""


@pytest.fixture
def my_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(MODULE)
    return path


def load(name, **options):
    return rewards.load(name, Backbones(), **options)


def test_incompressible_noise_wins_one_way_and_flat_grey_the_other():
    images = torch.stack([FLAT, NOISY])
    big, small = (load(f"jpeg-{way}").score(images, ["", ""]) for way in ("incompressibility", "compressibility"))
    assert big[1] > big[0] > 0
    assert torch.equal(small, -big)


def test_jpeg_size_is_the_kilobytes_of_a_saved_file(tmp_path):
    from PIL import Image

    pixels = (NOISY * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "noise.jpg", quality=95)
    found = load("jpeg-incompressibility").score(NOISY[None], [""]).item()
    assert found == pytest.approx((tmp_path / "noise.jpg").stat().st_size / 1000)


def test_gold_is_the_sandbox_world_s_own():
    from tdpo_cli.sandbox import world

    images, prompts = torch.rand(2, 3, 32, 32), ["a red circle on a blue background"] * 2
    try:
        expected = world.gold(images, prompts)
    except ValueError:  # the world's wording is its own business
        pytest.skip("the world does not know this prompt")
    assert torch.equal(load("gold").score(images, prompts), expected.float())


def test_function_of_a_file_scores(my_file):
    reward = load(f"{my_file}:brightness")
    assert reward.score(FLAT[None], [""]).tolist() == [0.5]
    assert list(reward.describe()["sha256"]) == [str(my_file)]


def test_function_of_a_module_in_the_working_directory_scores(my_file, monkeypatch):
    monkeypatch.chdir(my_file.parent)
    assert load("my_rewards:length").score(torch.stack([FLAT, FLAT]), ["four", "sixsix"]).tolist() == [4.0, 6.0]


@pytest.mark.parametrize("function,needed", [("brightness", False), ("length", True), ("nested", True), ("told", False)])
def test_function_needs_prompts_if_it_reads_them_or_says_so(my_file, function, needed):
    assert rewards.needs_prompt(f"{my_file}:{function}") is needed
    assert load(f"{my_file}:{function}").needs_prompt is needed


def test_nan_of_a_function_reaches_the_caller(my_file):
    assert math.isnan(load(f"{my_file}:undefined").score(FLAT[None], [""]).item())


@pytest.mark.parametrize("function,seen", [("pixels", r"\[2, 3, 64, 64\], expected \[2\]"), ("words", "a str, expected")])
def test_function_that_gives_no_number_per_image_is_named(my_file, function, seen):
    with pytest.raises(RewardError, match=seen):
        load(f"{my_file}:{function}").score(torch.stack([FLAT, FLAT]), ["", ""])


@pytest.mark.parametrize(
    "spec,message",
    [
        ("{file}:brigthness", "no function 'brigthness'; it has: brightness, length"),
        ("{file}:NUMBER", "no function 'NUMBER'"),
        ("{folder}/other.py:f", "there is no file"),
        ("no_such_module_at_all:f", "ModuleNotFoundError"),
        ("{file}:", "should be module:function"),
    ],
)
def test_custom_reward_that_cannot_be_had_is_explained(my_file, spec, message):
    with pytest.raises(RewardError, match=message):
        load(spec.format(file=my_file, folder=my_file.parent))


def test_file_that_fails_on_import_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match="broken.py failed: ZeroDivisionError"):
        load(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize("typed,meant", [("asthetic", "aesthetic"), ("PickScore", "pickscore"), ("hps", "hpsv2")])
def test_unknown_reward_comes_with_a_suggestion(typed, meant):
    with pytest.raises(RewardError, match=f"unknown reward '{typed}'. Did you mean {meant}"):
        load(typed)


def test_unknown_variant_is_refused():
    with pytest.raises(RewardError, match="unknown variant 'api' of reward jpeg-compressibility: expected tdpo or package"):
        load("jpeg-compressibility", variant="api")


def test_names_are_had_without_importing_torch():
    import subprocess
    import sys

    code = "import sys; from tdpo_cli import rewards; rewards.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_built_in_reward_has_a_factory():
    import importlib

    for module, factory, _ in rewards._REWARDS.values():
        assert callable(getattr(importlib.import_module(module), factory))
