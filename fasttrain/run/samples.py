"""samples.png: source images beside their augmented views, for a person to look at before training."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from fasttrain.input import Batch
from fasttrain.kernels.augment import Views
from fasttrain.system.durable import replace_file

IMAGES, CELL, LABELS = 12, 112, 18  # images on the page, side of the largest views there, height of their labels
BESIDE, BETWEEN = 2, 18  # pixels between an image's views, and between one image's and the next one's
WIDTH = 1100  # of the page, unless a single image with its views is wider


class Place(NamedTuple):
    """Where a view is drawn, in pixels from the corner of its image's row."""

    left: int
    top: int
    side: int
    label: str  # above it


def write_samples(path: pathlib.Path, batch: Batch, views: Views, mean: tuple, std: tuple) -> None:
    """Draw the first IMAGES images of a batch as source | view 1 | view 2 | …

    views: (V, B, 3, S, S) of each size, normalised by mean and std. They are drawn in proportion to their sizes, small
    ones below each other. Raises OSError.
    """
    count = min(IMAGES, len(batch))
    tiles = [tile for group in views for tile in unnormalised(group[:, :count], mean, std)]
    places = _places([(len(group), group.shape[-1]) for group in views])
    row = max(place.left + place.side for place in places) + BETWEEN
    across = min(count, max(1, WIDTH // row))
    down = -(-count // across)
    page = Image.new("RGB", (across * row, LABELS + down * (CELL + BESIDE)), "white")
    for b in range(count):
        left, top = BETWEEN // 2 + b % across * row, LABELS + b // across * (CELL + BESIDE)
        pictures = [source_image(batch, b), *(Image.fromarray(tile[b]) for tile in tiles)]
        for picture, place in zip(pictures, places, strict=True):
            _paste(page, picture, left + place.left, top + place.top, place.side)
            if b < across:
                ImageDraw.Draw(page).text((left + place.left, 2), place.label, fill="#444")
    replace_file(path, lambda file: page.save(file, "PNG"))


def _places(groups: list[tuple[int, int]]) -> list[Place]:
    """The places of a source image and of its views, given as how many there are of which side, largest or not."""
    largest = max(side for _, side in groups)
    places, left = [Place(0, 0, CELL, "source")], CELL + BESIDE
    for count, view_side in groups:
        side = max(1, round(CELL * view_side / largest))
        step = side + BESIDE
        stacked = min(count, (CELL + BESIDE) // step)
        above = (CELL + BESIDE - stacked * step) // 2
        for v in range(count):
            column, y = divmod(v, stacked)
            first = len(places)
            last = first + min(stacked, count - v) - 1
            label = f"{first}-{last}" if last > first else f"view {first}" if side == CELL else f"{first}"
            places.append(Place(left + column * step, above + y * step, side, "" if y else label))
        left += -(-count // stacked) * step
    return places


def unnormalised(group: Tensor, mean: tuple, std: tuple) -> np.ndarray:
    """Views (V, B, 3, S, S) as bytes (V, B, S, S, 3)."""
    shown = group.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return (shown.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def _paste(page: Image.Image, picture: Image.Image, left: int, top: int, side: int) -> None:
    """Put a picture into the middle of a square."""
    method = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
    cell = ImageOps.contain(picture, (side, side), method)
    page.paste(cell, (left + (side - cell.width) // 2, top + (side - cell.height) // 2))


def source_image(batch: Batch, b: int) -> Image.Image:
    """Image b of a batch, whole."""
    first, height, width = int(batch.offset_B[b]), int(batch.height_B[b]), int(batch.width_B[b])
    pixels: np.ndarray = batch.pixels[first : first + height * width * 3].cpu().numpy()
    return Image.fromarray(pixels.reshape(height, width, 3))
