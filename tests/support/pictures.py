"""Folders of small labelled images."""

import pathlib

import numpy as np
from PIL import Image


def make_images(folder: pathlib.Path, classes: int, per_class: int, seed: int = 0) -> pathlib.Path:
    """A class per folder; each class has its own stripe direction and period, all sizes differ."""
    generator = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            height, width = generator.integers(36, 72, 2)
            y, x = np.mgrid[:height, :width]
            wave = np.sin((x if c % 2 else y) * (0.3 + 0.25 * (c // 2)) + generator.uniform(0, 6))
            colours = generator.uniform(0, 255, (2, 3))
            pixels = colours[0] + (wave[..., None] > 0) * (colours[1] - colours[0])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{c}" / f"{i:03d}.jpg", quality=90)
    return folder
