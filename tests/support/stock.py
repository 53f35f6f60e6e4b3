"""Files that stock FFCV's own writer writes."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest


def stock(path: pathlib.Path, fields: dict[str, Any], samples: Sequence[tuple], workers: int = 1) -> pathlib.Path:
    """Have stock FFCV write samples, tuples in the order of its fields."""
    writer = pytest.importorskip("ffcv.writer")
    made = writer.DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=workers)
    made.from_indexed_dataset(samples, chunksize=3)
    return path


def picture(number: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth picture, (height, width, 3) uint8, whose mean tells its number, up to 60."""
    y, x = np.mgrid[:height, :width]
    wave = 8 * np.sin(x / 5 + number) + 8 * np.cos(y / 4)
    return np.stack([4.0 * number + wave, 255 - 4.0 * number - wave, 128 + wave], 2).clip(0, 255).astype(np.uint8)


def stock_set(folder: pathlib.Path, train: int = 40, val: int = 12, mode: str = "jpg") -> pathlib.Path:
    """train.beton and val.beton of pictures of four classes, with a companion between image and label."""
    fields = pytest.importorskip("ffcv.fields")
    folder.mkdir()
    for split, count in (("train", train), ("val", val)):
        kinds = {
            "photo": fields.RGBImageField(write_mode=mode),
            "about": fields.JSONField(),
            "kind": fields.IntField(),
        }
        samples = [(picture(i % 60, 36 + i % 5, 40 + i % 7), {"i": i}, i % 4) for i in range(count)]
        stock(folder / f"{split}.beton", kinds, samples)
    return folder
