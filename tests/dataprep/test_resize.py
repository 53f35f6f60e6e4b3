"""fasttrain.dataprep.resize: Pillow's result to within rounding, at any size, and a flat plane stays flat."""

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep.resize import resize_plane

SIZES = [(63, 257, 50, 200), (1, 1, 1, 1), (2, 300, 1, 100), (300, 2, 100, 1), (500, 375, 400, 300), (700, 900, 33, 41),
         (40, 30, 80, 61)]  # fmt: skip


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width), np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_equals_pillow(size: tuple[int, int, int, int]) -> None:
    height, width, new_height, new_width = size
    plane_HW = noise(height, width)
    resized_HW = resize_plane(plane_HW, new_height, new_width)
    expected = np.asarray(Image.fromarray(plane_HW).resize((new_width, new_height), Image.Resampling.HAMMING))
    assert resized_HW.dtype == np.uint8
    assert abs(resized_HW.astype(int) - expected).max() <= 2  # Pillow rounds between its passes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_a_flat_plane_stays_flat(size: tuple[int, int, int, int], value: int) -> None:
    assert (resize_plane(np.full(size[:2], value, np.uint8), *size[2:]) == value).all()


def test_part_of_a_plane() -> None:
    plane_HW = noise(61, 80)
    expected = resize_plane(plane_HW[:40, :60], 20, 30)
    part = resize_plane(plane_HW, 20, 30, (40.0, 60.0))
    np.testing.assert_array_equal(part[:-1, :-1], expected[:-1, :-1])  # the last ones also see what lies beyond
    beyond = resize_plane(plane_HW, 31, 40, (61.5, 80.5))
    assert beyond.shape == (31, 40)
    assert abs(beyond.astype(int).mean() - plane_HW.mean()) < 2


def test_rows_that_are_not_contiguous() -> None:
    plane_HW = noise(50, 70)
    np.testing.assert_array_equal(resize_plane(plane_HW[:, :65], 30, 40), resize_plane(plane_HW[:, :65].copy(), 30, 40))
