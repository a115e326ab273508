"""The device-side resize is Pillow's to the last grey level, for any size, alone or in a batch."""

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tdpo_cli.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, _band, letterbox, normalise, quantise, resize_crop, resizing_once

torch.set_num_threads(1)


def random_levels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[H,W,3] uint8, half of it pure black and white: hard edges make the kernel overshoot."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    hard = rng.integers(0, 2, (height, width, 1), dtype=np.uint8) * 255
    return np.where(rng.random((height, width, 1)) < 0.5, noise, hard)


def to_tensor(levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(levels).permute(2, 0, 1)[None] / 255


def pillow(levels: np.ndarray, size: int, offset) -> np.ndarray:
    """Resize as Pillow 10.4 does, row pass first: two resizes of one axis each, since newer versions may swap them."""
    height, width = levels.shape[:2]
    longest = int(size * max(height, width) / min(height, width))
    new_height, new_width = (longest, size) if height >= width else (size, longest)
    image = Image.fromarray(levels).resize((new_width, height), Image.BICUBIC).resize((new_width, new_height), Image.BICUBIC)
    left, top = offset(new_width - size), offset(new_height - size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(height=st.integers(2, 150), width=st.integers(2, 150), size=st.integers(2, 64), seed=st.integers(0, 9))
@example(height=512, width=512, size=224, seed=0)
@example(height=199, width=149, size=224, seed=0)
@example(height=3, width=90, size=32, seed=0)
@example(height=700, width=5, size=32, seed=0)
@example(height=32, width=77, size=32, seed=0)
def test_resize_crop_equals_pillow_to_the_last_grey_level(height, width, size, seed):
    levels = random_levels(height, width, seed)
    for crop_offset, offset in (("floor", lambda n: n // 2), ("round", lambda n: round(n / 2))):
        for images in (to_tensor(levels), torch.from_numpy(levels).permute(2, 0, 1)[None]):
            found = resize_crop(images, size, crop_offset)[0].permute(1, 2, 0).numpy()
            assert (found == pillow(levels, size, offset)).all()


def test_levels_are_resized_once_for_several_rewards_and_anew_for_other_levels():
    levels = torch.from_numpy(np.stack([random_levels(40, 50, seed) for seed in (0, 1)])).permute(0, 3, 1, 2)
    with resizing_once():
        first = resize_crop(levels, 32)
        assert resize_crop(levels, 32) is first
        for other in (resize_crop(levels[1:], 32), resize_crop(levels.clone()[1:], 32)):
            assert torch.equal(other, first[1:])
        assert torch.equal(resize_crop(levels, 16), resize_crop(levels / 255, 16))
    assert resize_crop(levels, 32) is not first


@pytest.mark.parametrize("height,width", [(512, 512), (301, 640), (224, 150), (64, 64), (1000, 501)])
def test_resize_equals_the_installed_pillow_in_one_call_up_to_twice_as_tall_as_wide(height, width):
    levels = random_levels(height, width)
    longest = int(224 * max(height, width) / min(height, width))
    new_size = (224, longest) if height >= width else (longest, 224)
    image = np.asarray(Image.fromarray(levels).resize(new_size, Image.BICUBIC))
    top, left = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
    found = resize_crop(to_tensor(levels), 224)[0].permute(1, 2, 0).numpy()
    assert (found == image[top : top + 224, left : left + 224]).all()


def test_batch_equals_its_images_one_by_one():
    images = torch.cat([to_tensor(random_levels(75, 110, seed)) for seed in range(5)])
    alone = torch.cat([resize_crop(image[None], 32) for image in images])
    assert torch.equal(resize_crop(images, 32), alone)


def test_planes_resized_together_equal_planes_resized_one_by_one(monkeypatch):
    """The grouping that a GPU gets."""
    from tdpo_cli.rewards import preprocess

    images = torch.cat([to_tensor(random_levels(90, 61, seed)) for seed in range(3)])
    band = lambda n_in, n_out, start: _band(n_in, n_out, start, 32, torch.device("cpu"))
    vertical, horizontal = band(90, 47, 7), band(61, 32, 0)
    planes = quantise(images).flatten(0, 1)
    rows = planes[:, vertical.first : vertical.last]
    across = rows.flatten(0, 1).t().contiguous()[None, horizontal.first : horizontal.last]
    done = preprocess._combine_rows(across, horizontal)[0].t().contiguous().view(-1, rows.shape[1], 32)
    together = preprocess._combine_rows(done, vertical).view(3, 3, 32, 32)
    assert torch.equal(together.float(), resize_crop(images, 32))


def test_image_of_the_right_size_is_only_quantised():
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(resize_crop(image, 32), (image * 255).round())


def test_half_precision_images_and_values_out_of_range_are_quantised_like_a_saved_file():
    image = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert quantise(image.to(dtype))[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_empty_batch_stays_empty():
    assert resize_crop(torch.zeros(0, 3, 60, 50), 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("n_in,n_out", [(5, 224), (224, 223), (512, 224), (4096, 224), (7, 3), (1, 32), (3000, 2)])
def test_fixed_point_sums_fit_in_32_bits(n_in, n_out):
    weights = _band(n_in, n_out, 0, n_out, torch.device("cpu")).weights.long()
    assert (weights.abs().sum(dim=0) * 255 + (1 << 21)).max() < 2**31


def test_extreme_ratio_does_not_build_the_long_side():
    found = resize_crop(torch.rand(1, 3, 2, 20000), 224)  # 2.2 million columns, of which 224 are wanted
    assert found.shape == (1, 3, 224, 224)


def test_normalise_is_per_channel():
    levels = torch.full((1, 3, 2, 2), 255.0)
    expected = [(1 - m) / s for m, s in zip(OPENAI_MEAN, OPENAI_STD, strict=False)]
    assert normalise(levels, OPENAI_MEAN, OPENAI_STD)[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_letterbox_keeps_the_whole_image_and_pads_with_black():
    found = letterbox(torch.ones(1, 3, 20, 40), 32)[0, 0]
    assert (found[:8] == 0).all() and (found[24:] == 0).all()
    assert torch.allclose(found[8:24], torch.tensor(255.0), atol=1e-3)


def test_letterbox_pads_an_image_whose_longest_side_already_fits():
    found = letterbox(torch.ones(1, 3, 32, 21), 32)
    assert found.shape == (1, 3, 32, 32)
    assert found[0, 0, 0].tolist() == [0.0] * 5 + [255.0] * 21 + [0.0] * 6


def test_coefficients_made_in_inference_mode_serve_outside_it():
    with torch.inference_mode():
        inside = resize_crop(torch.ones(1, 3, 77, 93), 31)
    assert torch.equal(resize_crop(torch.ones(1, 3, 77, 93), 31), inside)


@pytest.mark.slow
def test_batch_is_resized_faster_than_image_by_image_through_pillow():
    """512 -> 224 on one CPU thread, from a float batch to the network's input. `-m slow -s` prints the ratios."""
    from transformers import CLIPImageProcessorPil

    images = torch.rand(16, 3, 512, 512)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)

    def arrays() -> list[np.ndarray]:
        return [image.permute(1, 2, 0).contiguous().numpy() for image in quantise(images).byte()]

    def plain_pillow() -> torch.Tensor:
        resized = [np.array(Image.fromarray(array).resize((224, 224), Image.BICUBIC)) for array in arrays()]
        return normalise(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float(), OPENAI_MEAN, OPENAI_STD)

    paths = {
        "ours": lambda: normalise(resize_crop(images, 224), OPENAI_MEAN, OPENAI_STD),
        "Pillow's resize": plain_pillow,
        "CLIPImageProcessorPil": lambda: processor(images=arrays(), return_tensors="pt")["pixel_values"],
    }
    outputs = {name: path() for name, path in paths.items()}
    rounds = [{name: _seconds(path) for name, path in paths.items()} for _ in range(15)]  # in turn: others use the CPU too
    seconds = {name: min(one[name] for one in rounds) / len(images) for name in paths}
    for name, each in seconds.items():
        print(f"{name:24s} {each * 1e3:6.2f} ms an image, {each / seconds['ours']:.2f} x ours")
    assert all(torch.allclose(output, outputs["ours"], atol=1e-6) for output in outputs.values())
    assert seconds["ours"] < min(seconds["Pillow's resize"], seconds["CLIPImageProcessorPil"])


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
