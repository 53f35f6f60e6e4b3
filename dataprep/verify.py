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
from typing import Annotated, Literal, NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from fasttrain.dataprep.shards import checksum
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.manifest import EXTENSION, FILE_NAME, Index, Manifest, Shard
from fasttrain.formats.tar import read_index
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import DataError
from fasttrain.system.options import Bounds, Options
from fasttrain.system.pool import map_in_order
from fasttrain.system.progress import progress
from fasttrain.system.watch import Watch

EXIT_PROBLEMS = 1
TASK_IMAGES = 256


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
    """Worker processes; auto = one for each core this process may use."""


class Part(NamedTuple):
    """What a worker checks at once: a shard's files and structure (start -1), or the images of a range."""

    shard: Shard
    start: int
    stop: int


class Images(NamedTuple):
    """The samples of a shard: their labels, and how each is decoded (DataError if it can't be)."""

    label_N: np.ndarray
    decode: Callable[[int], object]


@functools.lru_cache(maxsize=2)
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
    samples = read_index(path)
    named = [place for sample in samples for place in sample.values()]
    try:
        with tarfile.open(path, "r:") as tar:
            if [(member.offset_data, member.size) for member in tar] != named:
                raise DataError(f"{path}: the index does not match the members")
    except tarfile.TarError as error:
        raise DataError(f"{path}: {error}") from None
    data = np.memmap(path, np.uint8, "r")

    def content(i: int, extension: str) -> np.ndarray:
        offset, size = samples[i][extension]
        return data[offset : offset + size]

    try:
        label_N = np.array([int(content(i, "cls").tobytes()) for i in range(len(samples))], np.int64)
    except ValueError:
        raise DataError(f"{path}: a label is not a whole number") from None
    return Images(label_N, lambda i: jpeg.decode(content(i, "jpg")))


def check_part(folder: pathlib.Path, num_classes: int, part: Part) -> list[str]:
    """Return the problems of a part, one line each."""
    path = folder / part.shard.name
    if part.start >= 0:
        return list(_check_images(path, range(part.start, part.stop)))
    problems = [problem for file in part.shard.files() for problem in _check_file(folder, file)]
    return problems + (list(_check_structure(path, part.shard.num_samples, num_classes)) if path.is_file() else [])


def _check_file(folder: pathlib.Path, file: Shard | Index) -> Iterator[str]:
    path = folder / file.name
    if not path.is_file():
        yield f"{path}: missing"
    elif (size := path.stat().st_size) != file.num_bytes:
        yield f"{path}: {size} bytes, but the manifest says {file.num_bytes}"
    elif checksum(path) != file.sha256:
        yield f"{path}: the content has changed (another SHA-256)"


def _check_structure(path: pathlib.Path, num_samples: int, num_classes: int) -> Iterator[str]:
    try:
        label_N = open_shard(path).label_N
    except (DataError, OSError) as error:
        yield str(error)
        return
    if len(label_N) != num_samples:
        yield f"{path}: {len(label_N)} samples, but the manifest says {num_samples}"
    if np.any((label_N < -1) | (label_N >= num_classes)):
        yield f"{path}: a label outside the {num_classes} classes"


def _check_images(path: pathlib.Path, indices: range) -> Iterator[str]:
    images = open_shard(path)
    for i in indices:
        try:
            images.decode(i)
        except DataError as error:
            yield f"{path}: sample {i}: {error}"


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
    first = [Part(shard, -1, 0) for shard in shards]
    sound = _check(config, manifest, first, problems)
    if config.deep:
        parts = [
            Part(shard, start, min(start + TASK_IMAGES, shard.num_samples))
            for shard in shards
            if shard.name in sound
            for start in range(0, shard.num_samples, TASK_IMAGES)
        ]
        _check(config, manifest, parts, problems)
    return problems


def _check(config: VerifyConfig, manifest: Manifest, parts: list[Part], problems: list[str]) -> set[str]:
    """Check parts in worker processes; add their problems, return the names of the shards whose parts have none."""
    check = functools.partial(check_part, config.out, len(manifest.classes))
    counts = [part.stop - part.start if part.start >= 0 else 0 for part in parts]
    faulty = set()
    watch: Watch[str] = Watch("part", str)
    results = map_in_order(check, parts, 0 if config.workers == "auto" else config.workers)
    with watch.patrol(), contextlib.closing(results), progress(sum(counts)) as advance:
        for part, count in zip(parts, counts, strict=True):
            with watch.at(part.shard.name):
                found = next(results)
            problems += found
            if found:
                faulty.add(part.shard.name)
            for _ in range(count):
                advance()
    return {part.shard.name for part in parts} - faulty


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
