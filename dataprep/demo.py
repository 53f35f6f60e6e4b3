#!/usr/bin/env python3
"""Draw a small labelled JPEG set for trying the whole program without a download.

    python dataprep/demo.py OUT

The ten classes are ten repeated motifs in OUT/<class>/<nnnnn>.jpg. Everything else is drawn anew for every image: what
two views of one image share is what names the class.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from PIL import Image

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.dataprep.motifs import MOTIFS, draw
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import Bounds, NotNegative, Options
from fasttrain.system.ordered import map_in_order
from fasttrain.system.progress import progress

CHUNK = 50  # images a thread draws per task
SETTINGS_FILE = ".demo.json"


@dataclass(frozen=True)
class DemoConfig(Options):
    """Draw a small labelled JPEG set: ten classes of repeated motifs, 96 to 500 px, OUT/<class>/<nnnnn>.jpg."""

    out: pathlib.Path
    """OUT, the folder to make. One that already holds this very set is kept; any other content is an error."""
    images: Annotated[int, Bounds(len(MOTIFS))] = 3000
    """Images in all, shared evenly among the ten classes; at least 10."""
    seed: NotNegative[int] = 0
    """Another seed draws other images of the same classes."""


def settings(config: DemoConfig) -> dict[str, int]:
    return {"images": config.images, "seed": config.seed}


def is_complete(config: DemoConfig) -> bool:
    """Whether config.out holds every image of exactly this set."""
    try:
        recorded = json.loads((config.out / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return recorded == settings(config) and sum(1 for _ in config.out.glob("*/*.jpg")) == config.images


def check(config: DemoConfig) -> None:
    """Raises UserError when config.out holds anything but this set."""
    empty = config.out.is_dir() and not any(config.out.iterdir())
    if config.out.exists() and not empty and not is_complete(config):
        raise UserError(f"{config.out} exists and is not a whole set of these settings: remove it or name another")


def write_images(out: pathlib.Path, seed: int, indices: range) -> None:
    """Writes the images of these indices; each depends on the seed and its own index only, not on who draws it."""
    names = list(MOTIFS)
    for index in indices:
        rng = np.random.default_rng([seed, index])
        number, label = divmod(index, len(names))
        image = Image.fromarray(draw(MOTIFS[names[label]], rng))
        image.save(out / names[label] / f"{number:05d}.jpg", quality=int(rng.integers(80, 96)))


def draw_all(out: pathlib.Path, config: DemoConfig) -> None:
    """Shares the images among all cores this process may use, showing progress on stderr."""
    chunks = [range(first, min(first + CHUNK, config.images)) for first in range(0, config.images, CHUNK)]
    drawn = map_in_order(partial(write_images, out, config.seed), chunks)
    with contextlib.closing(drawn), progress(config.images) as advance:
        for chunk, _ in zip(chunks, drawn, strict=True):
            advance(len(chunk))


def write_set(config: DemoConfig) -> None:
    """Draws the set beside config.out and renames it into place, so that a folder of that name is always whole.

    Raises OSError for a full disk or an unwritable folder; then nothing is left.
    """
    out = config.out.resolve()  # "." has no name
    unfinished = out.with_name(out.name + ".unfinished")
    if (unfinished / SETTINGS_FILE).exists():  # left by a run that was killed
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings(config)), "utf-8")
        for name in MOTIFS:
            (unfinished / name).mkdir()
        draw_all(unfinished, config)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def demo_command(config: DemoConfig) -> int:
    """Draw the set, or keep it; the last line on stdout is JSON: images, classes, seconds. Returns the exit status."""
    check(config)
    start = time.perf_counter()
    if is_complete(config):
        print(f"{config.out} already holds this set: kept")
    else:
        write_set(config)
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"images": config.images, "classes": len(MOTIFS), "seconds": seconds}), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: demo_command(parse(DemoConfig, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
