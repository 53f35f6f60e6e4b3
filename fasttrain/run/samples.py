"""samples.png: source images beside their augmented views, for a person to look at before training."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from fasttrain.input import Batch

PAIRS, COLUMNS, CELL, GAP = 12, 3, 112, 6


def write_samples(path: pathlib.Path, batch: Batch, views: Tensor, mean: tuple, std: tuple) -> None:
    """Draw the first PAIRS images of a batch as source | view 1 | view 2; views (B, V, 3, S, S) are normalised."""
    count = min(PAIRS, len(batch))
    shown = views[:count].float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    tiles = (shown.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    per_row = (1 + tiles.shape[1]) * CELL + 3 * GAP
    rows = -(-count // COLUMNS)
    page = Image.new("RGB", (COLUMNS * per_row + GAP, rows * (CELL + GAP) + GAP + 18), "white")
    for column in range(min(COLUMNS, count)):
        ImageDraw.Draw(page).text((GAP + column * per_row, 4), "source | view 1 | view 2", fill="#444")
    for b in range(count):
        top, left = 18 + GAP + (b // COLUMNS) * (CELL + GAP), GAP + (b % COLUMNS) * per_row
        for place, picture in enumerate([_source(batch, b), *map(Image.fromarray, tiles[b])]):
            method = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.LANCZOS
            cell = ImageOps.contain(picture, (CELL, CELL), method)
            page.paste(cell, (left + place * (CELL + 2) + (CELL - cell.width) // 2, top + (CELL - cell.height) // 2))
    page.save(path)


def _source(batch: Batch, b: int) -> Image.Image:
    first, height, width = int(batch.offset_B[b]), int(batch.height_B[b]), int(batch.width_B[b])
    pixels: np.ndarray = batch.pixels[first : first + height * width * 3].cpu().numpy()
    return Image.fromarray(pixels.reshape(height, width, 3))
