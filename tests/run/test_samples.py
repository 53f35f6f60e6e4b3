"""samples.png: every view in its place, as large beside the others as it is."""

import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.input import Batch
from fasttrain.run.samples import CELL, _places, write_samples


def batch_of(count: int) -> Batch:
    """Gray images of 20 × 30 px."""
    one = torch.ones(count, dtype=torch.int32)
    pixels = torch.full((count * 20 * 30 * 3,), 90, dtype=torch.uint8)
    index = torch.arange(count)
    return Batch(pixels, index * 20 * 30 * 3, one * 20, one * 30, index, index)


@pytest.mark.parametrize("groups", [[(1, 8)], [(2, 32)], [(2, 224), (6, 96)], [(2, 224), (8, 96)], [(1, 9), (7, 200)]])
def test_every_view_has_a_place_of_its_own(groups: list[tuple[int, int]]) -> None:
    places = _places(groups)
    assert len(places) == 1 + sum(count for count, _ in groups)
    taken = np.zeros((CELL, 3000), dtype=int)
    for place in places:
        assert place.top >= 0
        assert place.top + place.side <= CELL
        taken[place.top : place.top + place.side, place.left : place.left + place.side] += 1
    assert taken.max() == 1
    expected = [CELL] + [round(CELL * side / max(s for _, s in groups)) for count, side in groups for _ in range(count)]
    assert [place.side for place in places] == expected


def test_labels_number_the_views() -> None:
    labels = [place.label for place in _places([(2, 224), (5, 96)]) if place.label]
    assert labels == ["source", "view 1", "view 2", "3-4", "5-6", "7"]


@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_page_shows_each_view_as_it_was_before_it_was_normalised(tmp_path: pathlib.Path, count: int) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    views = tuple(torch.zeros(v, count, 3, size, size) for v, size in ((2, 16), (3, 4)))
    for number, view in enumerate([*views[0], *views[1]]):
        level = torch.tensor([number / 15, 0.0, 1.0])[:, None, None]
        view.copy_((level - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    write_samples(tmp_path / "samples.png", batch_of(count), views, mean, std)
    page = np.array(Image.open(tmp_path / "samples.png").convert("RGB"))
    images = min(count, 12)
    small = round(CELL / 4) ** 2
    for number, area in enumerate([CELL**2] * 2 + [small] * 3):
        colour = [17 * number, 0, 255]
        assert (page == colour).all(-1).sum() == images * area
    assert (page == 90).all(-1).sum() >= images * CELL * round(CELL * 20 / 30) * 0.95
