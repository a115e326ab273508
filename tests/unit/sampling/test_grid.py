"""Facts about labelled grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from tdpo_cli.sampling import grid


def tile(colour, size=(128, 128)):
    return Image.new("RGB", size, colour)


def colours(page):
    return {tuple(pixel) for pixel in np.asarray(page).reshape(-1, 3)}


def test_pixels_are_rounded_to_the_nearest_level():
    image = torch.tensor([0.0, 1.0, 0.5, 0.4 / 255, 0.6 / 255, -0.1, 1.1]).expand(3, 1, 7)
    assert np.asarray(grid.to_pil(image))[0, :, 0].tolist() == [0, 255, 128, 0, 1, 0, 255]


def test_channels_stay_red_green_blue():
    image = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1).expand(3, 2, 5)
    picture = grid.to_pil(image)
    assert picture.size == (5, 2) and picture.getpixel((0, 0)) == (255, 0, 128)


@pytest.mark.parametrize("count, columns, shape", [(1, 1, (1, 1)), (4, 2, (2, 2)), (5, 2, (2, 3)), (3, 8, (8, 1))])
def test_a_page_has_room_for_its_columns_and_rows(count, columns, shape):
    page = grid.draw([tile("red")] * count, ["x"] * count, columns)
    label = 15 + 4
    assert page.size == (8 + shape[0] * (128 + 8), 8 + shape[1] * (128 + label + 8))


def test_a_title_adds_a_header():
    assert grid.draw([tile("red")], ["x"], 1, title="t").height == grid.draw([tile("red")], ["x"], 1).height + 26


def test_small_images_are_enlarged_by_whole_pixels():
    small = tile("red", (32, 32))
    small.putpixel((0, 0), (0, 0, 255))
    page = grid.draw([small], [""], 1)
    assert page.width == 8 + 32 * 4 + 8
    assert colours(page) == {(255, 255, 255), (255, 0, 0), (0, 0, 255)}  # no smoothing
    assert page.getpixel((8 + 3, 8 + 3)) == (0, 0, 255) and page.getpixel((8 + 4, 8 + 4)) == (255, 0, 0)


def test_images_stand_row_by_row_in_order():
    page = grid.draw([tile(colour) for colour in ("red", "lime", "blue")], ["", "", ""], 2)
    step = 128 + 8
    row = step + 4
    centres = [(8 + 64, 8 + 64), (8 + step + 64, 8 + 64), (8 + 64, 8 + row + 64)]
    assert [page.getpixel(centre) for centre in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_labels_are_drawn_below_their_image():
    with_label, without = grid.draw([tile("red")], ["a cat"], 1), grid.draw([tile("red")], [" "], 1)
    below = np.asarray(with_label)[8 + 128 :]
    assert (below < 200).any()
    assert not (np.asarray(without)[8 + 128 :] < 200).any()


def test_long_labels_are_wrapped_to_at_most_four_lines():
    long = "a very long prompt " * 30
    assert grid.draw([tile("red")], [long], 1).height == 8 + 128 + 4 * 15 + 4 + 8


def test_every_image_needs_a_label():
    with pytest.raises(ValueError):
        grid.draw([tile("red")] * 2, ["x"], 2)
