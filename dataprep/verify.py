#!/usr/bin/env python3
"""Check a converted data set against its manifest.

    python dataprep/verify.py OUT --deep

Existence, size, checksum, structure and sample count of every shard and index; with --deep every image is decoded.
One line for each problem; the last line on stdout is JSON: {"ok": ..., "problems": [...]}.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, NamedTuple, TypeVar

import numpy as np

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from fasttrain.dataprep.shards import checksum
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.manifest import EXTENSION, FILE_NAME, Index, Manifest, Shard
from fasttrain.formats.tar import TarShardReader
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import DataError
from fasttrain.system.options import Bounds, Options
from fasttrain.system.ordered import map_in_order
from fasttrain.system.progress import progress
from fasttrain.system.watch import Watch

EXIT_PROBLEMS = 1
TASK_IMAGES = 256

Found = TypeVar("Found")


@dataclass(frozen=True)
class VerifyConfig(Options):
    """Check a converted data set: every shard and index against the manifest, and files that it does not know.

    Exit status: 0 all is well, 1 problems found, 2 no converted data set. The last line on stdout is JSON.
    """

    out: pathlib.Path
    """OUT, the converted data set."""
    deep: bool = False
    """Decode every image, too."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Threads; auto = one for each core this process may use."""


class Images(NamedTuple):
    """The samples of a shard: their labels, and how each is decoded (DataError if it can't be)."""

    label_N: np.ndarray
    decode: Callable[[int], object]


@dataclass(frozen=True)
class Check(Generic[Found]):
    """What a thread does at once: to which shard, to how many images of it, and how."""

    shard: str
    num_images: int
    run: Callable[[], Found]


def open_shard(path: pathlib.Path) -> Images:
    """Open a shard of either format and check its structure; DataError names what is wrong."""
    return _open_tar(path) if path.suffix == ".tar" else _open_beton(path)


def _open_beton(path: pathlib.Path) -> Images:
    reader = BetonReader(path)

    def decode(i: int) -> None:
        start, size = int(reader.pointer_N[i]), int(reader.size_N[i])
        if reader.mode_N[i] == MODE_RAW:
            return  # its size was checked with the structure
        pixels_HW3 = np.empty((int(reader.height_N[i]), int(reader.width_N[i]), 3), np.uint8)
        jpeg.decode_into(reader.data.ctypes.data + start, size, *pixels_HW3.shape[:2], pixels_HW3.ctypes.data)

    return Images(reader.label_N, decode)


def _open_tar(path: pathlib.Path) -> Images:
    reader = TarShardReader(path)
    at_NM = np.stack([reader.jpeg_at_N, reader.label_at_N], 1)
    size_NM = np.stack([reader.jpeg_size_N, reader.label_size_N], 1)
    named = list(zip(at_NM.ravel().tolist(), size_NM.ravel().tolist(), strict=True))
    try:
        with tarfile.open(path, "r:") as tar:
            if [(member.offset_data, member.size) for member in tar] != named:
                raise DataError(f"{path}: the index does not match the members")
    except tarfile.TarError as error:
        raise DataError(f"{path}: {error}") from None
    label_N = np.array([reader.label(row) for row in range(reader.num_samples)], np.int64)
    return Images(label_N, lambda row: jpeg.decode(reader.jpeg(row)))


def check_shard(folder: pathlib.Path, num_classes: int, shard: Shard) -> tuple[list[str], Images | None]:
    """Return the problems of a shard's files and structure, one line each, and its images if they can be read."""
    path = folder / shard.name
    problems = [problem for file in shard.files() for problem in _check_file(folder, file)]
    try:
        images = open_shard(path) if path.is_file() else None
    except (DataError, OSError) as error:
        return [*problems, str(error)], None
    if images is not None:
        problems += _check_labels(path, images.label_N, shard.num_samples, num_classes)
    return problems, images


def _check_file(folder: pathlib.Path, file: Shard | Index) -> Iterator[str]:
    path = folder / file.name
    if not path.is_file():
        yield f"{path}: missing"
    elif (size := path.stat().st_size) != file.num_bytes:
        yield f"{path}: {size} bytes, but the manifest says {file.num_bytes}"
    elif checksum(path) != file.sha256:
        yield f"{path}: the content has changed (another SHA-256)"


def _check_labels(path: pathlib.Path, label_N: np.ndarray, num_samples: int, num_classes: int) -> Iterator[str]:
    if len(label_N) != num_samples:
        yield f"{path}: {len(label_N)} samples, but the manifest says {num_samples}"
    if np.any((label_N < -1) | (label_N >= num_classes)):
        yield f"{path}: a label outside the {num_classes} classes"


def check_images(path: pathlib.Path, images: Images, rows: range) -> list[str]:
    """Decode some images of a shard; return a line for each that can't be."""
    problems = []
    for row in rows:
        try:
            images.decode(row)
        except DataError as error:
            problems.append(f"{path}: sample {row}: {error}")
    return problems


def unknown_files(folder: pathlib.Path, manifest: Manifest) -> list[str]:
    """Return a problem for each file that looks like a part of a data set but is not in the manifest."""
    known = {file.name for shards in manifest.splits.values() for shard in shards for file in shard.files()}
    suffixes = (*EXTENSION.values(), ".idx", ".tmp")
    names = sorted(name for name in os.listdir(folder) if name.endswith(suffixes) and name not in known)
    return [f"{folder / name}: not in {FILE_NAME}" for name in names]


def verify(config: VerifyConfig) -> list[str]:
    """Return the problems of a data set; ManifestError if there is no readable manifest."""
    manifest = Manifest.load(config.out)
    shards = [shard for group in manifest.splits.values() for shard in group]
    odd = [file.name for shard in shards for file in shard.files() if os.path.basename(file.name) != file.name]
    if odd:
        return [f"{config.out / FILE_NAME}: {name!r} is no plain file name" for name in odd]
    problems = unknown_files(config.out, manifest)
    check = functools.partial(check_shard, config.out, len(manifest.classes))
    whole = [Check(shard.name, shard.num_samples, functools.partial(check, shard)) for shard in shards]
    sound: dict[str, Images] = {}
    for shard, (found, images) in zip(shards, _results(config, "files", whole), strict=True):
        problems += found
        if images is not None and not found:
            sound[shard.name] = images
    if config.deep:
        deep = [
            Check(name, len(rows), functools.partial(check_images, config.out / name, images, rows))
            for name, images in sound.items()
            for rows in _portions(len(images.label_N))
        ]
        for lines in _results(config, "images", deep):
            problems += lines
    return problems


def _portions(num_samples: int) -> list[range]:
    return [range(start, min(start + TASK_IMAGES, num_samples)) for start in range(0, num_samples, TASK_IMAGES)]


def _results(config: VerifyConfig, title: str, checks: list[Check[Found]]) -> Iterator[Found]:
    """Yield what checks find, run by threads, in order, with their progress, and a word where storage hangs."""
    watch: Watch[str] = Watch("part", str)

    def run(check: Check[Found]) -> Found:
        with watch.at(check.shard):
            return check.run()

    results = map_in_order(run, checks, 0 if config.workers == "auto" else config.workers)
    total = sum(check.num_images for check in checks)
    with watch.patrol(), contextlib.closing(results), progress(total, title=title) as advance:
        for check, found in zip(checks, results, strict=True):
            advance(check.num_images)
            yield found


def verify_command(config: VerifyConfig) -> int:
    """Check, print the problems and the summary; returns the exit status."""
    problems = verify(config)
    for problem in problems:
        print(problem)
    print(json.dumps({"ok": not problems, "problems": problems}), flush=True)
    return EXIT_PROBLEMS if problems else 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: verify_command(parse(VerifyConfig, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
