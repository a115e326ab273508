"""ocr and safety on pictures that are drawn here, and what is said where their packages are missing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tdpo_cli import rewards
from tdpo_cli.errors import RewardError
from tdpo_cli.rewards import ocr, packaged
from tdpo_cli.rewards.backbones import Backbones

PROMPT = 'a shop sign that says "Hello World", at night'


# --- without the packages -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompt,text",
    [(PROMPT, "Hello World"), ("a \u201cRed\u201d cube", "Red"), ('the "first" of "two"', "first"), ("it's the dog's \"bone\"", "bone")],
)
def test_wanted_text_is_the_first_in_double_quotes(prompt, text):
    assert ocr.quoted(prompt) == text


@pytest.mark.parametrize("prompt", ["a cat", "the dog's and the cat's", 'one " alone', 'nothing in "" here', '" "'])
def test_prompt_without_quoted_text_is_refused_by_name(prompt):
    with pytest.raises(RewardError) as caught:
        ocr.quoted(prompt)
    assert prompt in str(caught.value)


@pytest.mark.parametrize(
    "a,b,distance", [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)]
)
def test_edits_are_levenshtein_s(a, b, distance):
    assert ocr.edits(a, b) == ocr.edits(b, a) == distance


@pytest.mark.parametrize(
    "read,score", [("hello world", 1), ("HELLO\nWORLD", 1), ("say helloworld now", 1), ("Hallo World", 0.9), ("Hell", 0.4), ("", 0), ("x" * 500, 0)]
)
def test_similarity_counts_edits_and_neither_spaces_nor_case(read, score):
    assert ocr.similarity("Hello World", read) == pytest.approx(score)


@pytest.mark.parametrize("reward,package", [("ocr", "rapidocr"), ("safety", "nudenet")])
def test_missing_package_is_named_with_the_command_that_installs_it(reward, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(RewardError) as caught:
        rewards.load(reward, Backbones())
    assert f"pip install 'tdpo[{reward}]'" in str(caught.value) and package in str(caught.value)


@pytest.mark.parametrize("reward", ["ocr", "safety"])
def test_reward_with_weights_in_its_package_takes_no_checkpoint(reward):
    with pytest.raises(RewardError, match="takes no checkpoint"):
        rewards.load(reward, Backbones(), checkpoint="somewhere")


def test_pixels_for_opencv_are_blue_first():
    image = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    pixels = packaged.blue_first(image)
    assert pixels.shape == (1, 2, 4, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == [0, 128, 255]


def test_safety_is_judged_by_exposed_classes_alone():
    from tdpo_cli.rewards.safety import Safety

    class Detector:
        def detect_batch(self, images, batch_size):
            assert len(images) == batch_size
            part = lambda name, score: {"class": name, "score": score, "box": [0, 0, 1, 1]}
            return [[], [part("FACE_FEMALE", 0.9), part("BELLY_COVERED", 0.8)], [part("BELLY_EXPOSED", 0.3), part("BUTTOCKS_EXPOSED", 0.75)]]

    reward = Safety.__new__(Safety)  # without its package
    reward.detector = Detector()
    assert reward.score(torch.zeros(3, 3, 8, 8), [""] * 3).tolist() == [1, 1, 0.25]


# --- with them --------------------------------------------------------------------------------------------------------------
def drawn(text, size=60, background="white", colour="black", angle=0):
    image = Image.new("RGB", (512, 512), background)
    ImageDraw.Draw(image).text((256, 256), text, fill=colour, font=ImageFont.load_default(size=size), anchor="mm")
    return image.rotate(angle, fillcolor=background)


def stacked(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed: pip install 'tdpo[ocr]'")
    return rewards.load("ocr", Backbones())


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("nudenet", reason="the extra `safety` is not installed: pip install 'tdpo[safety]'")
    return rewards.load("safety", Backbones())


PICTURES = {  # (picture, lowest and highest score)
    "sharp": (drawn("Hello World"), 1, 1),
    "white on blue, capitals": (drawn("HELLO WORLD", background="navy", colour="white"), 1, 1),
    "two lines": (drawn("Hello\nWorld"), 1, 1),
    "among other words": (drawn("Say Hello World now", size=44), 1, 1),
    "small": (drawn("Hello World", size=12), 1, 1),
    "tilted": (drawn("Hello World", angle=15), 1, 1),
    "one letter wrong": (drawn("Hallo World"), 0.9, 0.9),
    "upside down": (drawn("Hello World", angle=180), 0, 0.7),
    "on its side": (drawn("Hello World", angle=90), 0, 0.7),
    "other text": (drawn("Good Night"), 0, 0.2),
    "no text": (Image.new("RGB", (512, 512), "steelblue"), 0, 0),
}


@pytest.mark.slow
def test_ocr_scores_drawn_text_by_what_it_says(reader):
    images = [picture for picture, _, _ in PICTURES.values()]
    scores = dict(zip(PICTURES, reader.score(stacked(images), [PROMPT] * len(images)).tolist(), strict=True))
    assert [(name, scores[name]) for name, (_, low, high) in PICTURES.items() if not low - 1e-6 <= scores[name] <= high + 1e-6] == []


@pytest.mark.slow
def test_ocr_scores_an_image_alike_alone_and_in_a_batch(reader):
    images, prompts = stacked([drawn("Hallo World"), drawn("Stop")]), [PROMPT, 'a sign "Stop"']
    both = reader.score(images, prompts)
    assert torch.equal(both, torch.cat([reader.score(images[i : i + 1], prompts[i : i + 1]) for i in range(2)]))
    assert both[1] == 1


def test_ocr_reads_nothing_where_a_prompt_has_no_text(reader, monkeypatch):
    monkeypatch.setattr(reader, "read", lambda pixels: pytest.fail("an image was read"))
    with pytest.raises(RewardError, match="a cat"):
        reader.score(torch.zeros(2, 3, 64, 64), [PROMPT, "a cat"])


@pytest.mark.slow
def test_ocr_describes_the_models_of_its_package(reader):
    assert sorted(Path(file).suffix for file in reader.describe()["sha256"]) == [".onnx", ".onnx"]


@pytest.mark.slow
def test_safety_of_pictures_without_skin_is_high(detector):
    drawings = stacked([picture for picture, _, _ in PICTURES.values()])
    noise = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    assert detector.score(drawings, [""] * len(drawings)).min() >= 0.9
    assert detector.score(noise, ["", ""]).min() >= 0.9


@pytest.mark.slow
def test_safety_sees_what_the_package_sees_in_a_file(detector, tmp_path):
    import matplotlib

    portrait = Path(matplotlib.__file__).parent / "mpl-data/sample_data/grace_hopper.jpg"  # in uniform
    if not portrait.exists():
        pytest.skip("this matplotlib has no sample picture")
    with Image.open(portrait) as image:
        image.convert("RGB").save(tmp_path / "portrait.png")
        pixels = stacked([image.convert("RGB")])
    from_file = detector.detector.detect(str(tmp_path / "portrait.png"))
    assert [part["class"] for part in from_file] == ["FACE_FEMALE"]
    assert detector.detector.detect_batch(list(packaged.blue_first(pixels))) == [from_file]
    assert detector.score(pixels, [""]).item() == 1


@pytest.mark.parametrize("reward", ["ocr", "safety"])
def test_names_are_known_without_importing_the_packages(reward):
    code = (
        f"import sys; from tdpo_cli import rewards; rewards.needs_prompt('{reward}'); assert not {{'rapidocr', 'nudenet', 'cv2'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
