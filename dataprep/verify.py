#!/usr/bin/env python3
"""Check a converted data set against its manifest.

    python dataprep/verify.py OUT --deep

Existence, size, checksum, structure and sample count of every shard and index; with --deep every image is decoded.
One line for each problem; the last line on stdout is JSON: {"ok": ..., "problems": [...]}.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.dataprep.shards import checksum
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.boundary import boundary, reason_of
from fasttrain.formats.manifest import EXTENSION, FILE_NAME, Index, Manifest, Shard
from fasttrain.formats.tar import TarShardReader
from fasttrain.formats.tar_headers import TarDamage, tar_headers
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import DataError
from fasttrain.system.options import Bounds, Options
from fasttrain.system.ordered import map_in_order
from fasttrain.system.progress import progress
from fasttrain.system.regular import open_regular
from fasttrain.system.watch import Watch

EXIT_PROBLEMS = 1
IMAGES_AT_ONCE = 256  # of a shard, that a thread decodes at once
OPEN_SHARDS = 2  # kept open besides those that threads are at: a large set has more shards than a process may open


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


Decode = Callable[[int], object]  # one sample of a shard, by its number; DataError if it can't be


class Task(NamedTuple):
    """What a thread does at once: to which shard, to how many images of it, and how; the result is its problems."""

    shard: str
    num_images: int
    run: Callable[[], list[str]]


def check_shard(folder: pathlib.Path, num_classes: int, shard: Shard) -> list[str]:
    """Return the problems of a shard's files, structure and labels, one line each."""
    path = folder / shard.name
    problems = [problem for file in shard.files() for problem in _check_file(folder, file)]
    try:
        if path.is_file():
            with boundary(path):
                problems += _check_labels(path, read_labels(path), shard.num_samples, num_classes)
    except DataError as error:
        problems.append(str(error))
    return problems


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


def read_labels(path: pathlib.Path) -> np.ndarray:
    """Check the structure of a shard of either format, and return its labels (N,); DataError names what is wrong."""
    if path.suffix != ".tar":
        return BetonReader(path).label_N
    reader = TarShardReader(path)
    at_NM = np.stack([reader.jpeg_at_N, reader.label_at_N], 1)
    size_NM = np.stack([reader.jpeg_size_N, reader.label_size_N], 1)
    named = zip(at_NM.ravel().tolist(), size_NM.ravel().tolist(), strict=True)
    try:
        with open_regular(path) as file:
            members = ((member.offset_data, member.size) for member in tar_headers(file))
            if any(member != indexed for member, indexed in itertools.zip_longest(members, named)):
                raise DataError(f"{path}: the index does not match the members")
    except TarDamage as error:
        raise DataError(f"{path}: {error}") from None
    return np.array([reader.label(row) for row in range(reader.num_samples)], np.int64)


def check_images(
    path: pathlib.Path, rows: range, opened: Callable[[pathlib.Path], Decode], moved: Callable[[], None]
) -> list[str]:
    """Decode some images of a shard; return a line for each that can't be. moved is called after each."""
    try:
        with boundary(path):
            decode = opened(path)
    except DataError as error:  # it was sound a moment ago
        return [str(error)]
    problems = []
    for row in rows:
        try:
            decode(row)
        except Exception as error:
            problems.append(f"{path}: sample {row}: {reason_of(error)}")
        moved()
    return problems


def open_images(path: pathlib.Path) -> Decode:
    """Return what decodes the samples of a shard, which is open as long as that lives. Raises DataError, OSError."""
    if path.suffix == ".tar":
        tar = TarShardReader(path)
        return lambda row: jpeg.decode(tar.jpeg(row))
    reader = BetonReader(path)

    def decode(row: int) -> None:
        start, size = int(reader.pointer_N[row]), int(reader.size_N[row])
        if reader.mode_N[row] == MODE_RAW:
            return  # its size was checked with the structure
        pixels_HW3 = np.empty((int(reader.height_N[row]), int(reader.width_N[row]), 3), np.uint8)
        jpeg.decode_into(reader.data.ctypes.data + start, size, *pixels_HW3.shape[:2], pixels_HW3.ctypes.data)

    return decode


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
    check = functools.partial(check_shard, config.out, len(manifest.classes))
    whole = [Task(shard.name, shard.num_samples, functools.partial(check, shard)) for shard in shards]
    found = list(_results(config, "files", whole, Watch("shard", str)))
    problems = [*unknown_files(config.out, manifest), *itertools.chain.from_iterable(found)]
    if config.deep:
        problems += _decode_all(config, [shard for shard, lines in zip(shards, found, strict=True) if not lines])
    return problems


def _decode_all(config: VerifyConfig, shards: list[Shard]) -> list[str]:
    """Return the problems of the images of sound shards."""
    watch: Watch[str] = Watch("image", str)
    opened = functools.lru_cache(OPEN_SHARDS)(open_images)

    def task(shard: Shard, start: int) -> Task:
        rows = range(start, min(start + IMAGES_AT_ONCE, shard.num_samples))
        path = config.out / shard.name
        return Task(shard.name, len(rows), lambda: check_images(path, rows, opened, watch.moved))

    tasks = [task(shard, start) for shard in shards for start in range(0, shard.num_samples, IMAGES_AT_ONCE)]
    return list(itertools.chain.from_iterable(_results(config, "images", tasks, watch)))


def _results(config: VerifyConfig, title: str, tasks: list[Task], watch: Watch[str]) -> Iterator[list[str]]:
    """Yield the problems that tasks find, run by threads, in order, with their progress; watch names what hangs."""

    def run(task: Task) -> list[str]:
        with watch.at(task.shard):
            return task.run()

    results = map_in_order(run, tasks, 0 if config.workers == "auto" else config.workers)
    total = sum(task.num_images for task in tasks)
    with watch.patrol(), contextlib.closing(results), progress(total, title=title) as advance:
        for task, found in zip(tasks, results, strict=True):
            advance(task.num_images)
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
