#!/usr/bin/env python3
"""Photographs alone, and photographs with a drawn shape on them, for --method sepclr: what is on a part of the images
names their classes.

    python benchmarks/backgrounds.py SOURCE data/backgrounds

SOURCE: train/CLASS/IMAGE and test/CLASS/IMAGE, such as CIFAR-10 as folders. OUT/shapes has half of the images as
photographs alone, in the class `background`, and the others evenly in the classes of the shape that each has on it.
OUT/photographs has the latter once more, as links, by the class of the photograph. What is salient is measured on the
first, and what is common on the second.
"""

from __future__ import annotations

import colorsys
import os
import pathlib
import shutil
import sys
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import numpy as np
from PIL import Image, ImageDraw

from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import NotNegative, Options, Positive

# Outlines in the square from −1 to 1
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "bar": ((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "circle": tuple((0.85 * np.cos(a), 0.85 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 32, endpoint=False)),
    "cross": (
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
        (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ),
    "triangle": ((0, -1), (0.87, 0.5), (-0.87, 0.5)),
}  # fmt: skip
SIZES = 0.4, 0.55  # across a shape, as a part of the image's side
FINE = 8  # times as many pixels a side where a shape is drawn, which smooths its edge


@dataclass(frozen=True)
class Backgrounds(Options):
    """Draw shapes on half of a set's photographs: OUT/shapes by shape, and OUT/photographs by what was photographed."""

    source: pathlib.Path
    """SOURCE: train/CLASS/IMAGE and test/CLASS/IMAGE."""
    out: pathlib.Path
    """OUT, the folder to make."""
    train: Positive[int] = 20_000
    """Images to train on, over all shapes and the background."""
    test: Positive[int] = 4_000
    """Images to evaluate on."""
    seed: NotNegative[int] = 0
    """Another seed takes other photographs and draws other shapes."""


def with_shape(photograph: Image.Image, shape: str, rng: np.random.Generator) -> Image.Image:
    """With the shape on it: of a bright colour, somewhere, turned somehow."""
    side = min(photograph.size)
    radius = side * rng.uniform(*SIZES) / 2
    turn = rng.uniform(0, 2 * np.pi)
    turned_22 = radius * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle_2 = [rng.uniform(radius, length - radius) for length in photograph.size]
    corner_P2 = FINE * (np.array(SHAPES[shape]) @ turned_22.T + middle_2)
    mask = Image.new("L", (FINE * photograph.width, FINE * photograph.height))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corner_P2], fill=255)
    colour = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.6, 1), rng.uniform(0.7, 1))
    smooth = mask.resize(photograph.size, Image.Resampling.BOX)
    photograph.paste(tuple(round(255 * part) for part in colour), mask=smooth)
    return photograph


def write_split(options: Backgrounds, out: pathlib.Path, split: str, count: int) -> None:
    """A split's images, every second one with a shape. Raises UserError where there are too few photographs."""
    files = sorted((options.source / split).glob("*/*"))
    if len(files) < count:
        raise UserError(f"{options.source / split} has {len(files)} images in folders of classes, fewer than {count}")
    rng = np.random.default_rng([options.seed, split == "test"])
    for number, place in enumerate(rng.permutation(len(files))[:count]):
        shape = list(SHAPES)[number // 2 % len(SHAPES)] if number % 2 else "background"
        with Image.open(files[place]) as opened:
            image = opened.convert("RGB")
        drawn = out / "shapes" / split / shape / f"{number:05d}.png"
        drawn.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            image = with_shape(image, shape, rng)
            link = out / "photographs" / split / files[place].parent.name / drawn.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(drawn, link.parent))
        image.save(drawn)


def write(options: Backgrounds) -> int:
    """Beside OUT, and renamed into place, so that a folder of that name is always whole."""
    if options.out.exists():
        raise UserError(f"{options.out} exists already")
    unfinished = options.out.with_name(f"{options.out.name}.unfinished-{os.getpid()}")
    try:
        for split, count in (("train", options.train), ("test", options.test)):
            write_split(options, unfinished, split, count)
        unfinished.rename(options.out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: write(parse(Backgrounds, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
