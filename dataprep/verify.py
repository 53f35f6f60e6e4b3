#!/usr/bin/env python3
"""Check a converted data set against its manifest.

    python dataprep/verify.py OUT --deep
    python dataprep/verify.py OUT --sample 100

Existence, size, checksum, structure, sample count and labels of every shard, its index and its names, and of the list
of what was skipped; with --deep every image is decoded. FFCV's own .beton files state no checksum: of them the
structure is checked, and with --deep the images. Of a set behind a URL one listing tells names and sizes, and no shard
is read. One line for each problem; the last line on stdout is JSON: {"ok": ..., "problems": [...]}.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.dataprep.destination import RemoteFolder
from fasttrain.dataprep.shards import checksum
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.beton_set import beton_files
from fasttrain.formats.boundary import boundary, reason_of
from fasttrain.formats.image import check_size, decode_rgb
from fasttrain.formats.manifest import (
    EXTENSION,
    FILE_NAME,
    SKIPPED_FILE,
    STATE_FILE,
    Manifest,
    ManifestError,
    Shard,
    SideFile,
    spread,
    wrong_label,
)
from fasttrain.formats.names import EXTENSION as NAMES_EXTENSION
from fasttrain.formats.names import count_lines, sample_name
from fasttrain.formats.tar import TarShardReader
from fasttrain.formats.tar_headers import TarDamage, tar_headers
from fasttrain.storage.attempts import without_secrets
from fasttrain.storage.remote import is_http, is_remote, local_path
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import DataError, UserError, note, printable
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
    """Check a converted data set: every shard and index against the manifest, and files that it does not know. Or a
    .beton file of stock FFCV's, or a folder of them: their structure. Of a set behind a URL, sizes are compared.

    Exit status: 0 all is well, 1 problems found, 2 no converted data set. The last line on stdout is JSON.
    """

    out: str
    """OUT, the converted data set, or FFCV's own: a path, or a URL of a converted one."""
    sample: Annotated[int, Bounds(0)] = 0
    """Check so many evenly spread shards alone, of a set that has more; 0 = all."""
    deep: bool = False
    """Decode every image, too."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Threads; auto = one for each core this process may use."""


AnyShard = TypeVar("AnyShard", Shard, pathlib.Path)
Decode = Callable[[int], object]  # one sample of a shard, by its number; DataError if it can't be


class Task(NamedTuple):
    """What a thread does at once: to which shard, to how many images of it, and how; the result is its problems."""

    shard: str
    num_images: int
    run: Callable[[], list[str]]


class Images(NamedTuple):
    """A file of images to decode, how many it holds, and its file of names, if any."""

    path: pathlib.Path
    num_samples: int
    names: pathlib.Path | None


class ClassCounts:
    """Samples of each class that threads have found in the shards of a split: int64, count_C."""

    def __init__(self, num_classes: int) -> None:
        self.count_C, self._lock = np.zeros(num_classes, np.int64), threading.Lock()

    def add(self, label_N: np.ndarray) -> None:
        """Count the labels of a shard that are those of classes."""
        num_classes = len(self.count_C)
        found_C = np.bincount(label_N[(label_N >= 0) & (label_N < num_classes)], minlength=num_classes)
        with self._lock:
            self.count_C += found_C


def check_shard(folder: pathlib.Path, counts: ClassCounts, shard: Shard) -> list[str]:
    """Return the problems of a shard's files, structure and labels, one line each; count its samples of each class."""
    path = folder / shard.name
    problems = [problem for file in shard.files() for problem in _check_file(folder, file)]
    try:
        if path.is_file():
            with boundary(path):
                label_N = read_labels(path)
            problems += _check_labels(path, label_N, shard.num_samples, len(counts.count_C))
            counts.add(label_N)
        if shard.names and not problems and count_lines(folder / shard.names.name) != shard.num_samples:
            problems.append(f"{folder / shard.names.name}: not a name for each of {shard.num_samples} samples")
    except (DataError, OSError) as error:
        problems.append(str(error))
    return problems


def _check_counts(manifest: Manifest, counts: dict[str, ClassCounts]) -> Iterator[str]:
    """Yield a line for each split of whose classes the shards hold other numbers than the manifest says."""
    for split, stated in manifest.class_counts.items():
        found = counts[split].count_C.tolist()
        for name, in_manifest, in_shards in zip(manifest.classes, stated, found, strict=True):
            if in_manifest != in_shards:
                yield f"{FILE_NAME}: {in_manifest} samples of {name!r} in {split}, but the shards hold {in_shards}"
                break


def _check_file(folder: pathlib.Path, file: Shard | SideFile) -> Iterator[str]:
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
    if problem := wrong_label(label_N, num_classes):
        yield f"{path}: {problem}"


def read_labels(path: pathlib.Path) -> np.ndarray:
    """Check the structure of a shard of either format, and return its labels (N,); DataError names what is wrong."""
    if path.suffix != ".tar":
        return BetonReader(path).label_N
    reader = TarShardReader(path)
    samples = [reader.sample(row) for row in range(reader.num_samples)]
    named = (place for sample in samples for place in (sample[1:3], sample[3:5]))
    try:
        with open_regular(path) as file:
            members = ((member.offset_data, member.size) for member in tar_headers(file))
            if any(member != indexed for member, indexed in itertools.zip_longest(members, named)):
                raise DataError(f"{path}: the index does not match the members")
    except TarDamage as error:
        raise DataError(f"{path}: {error}") from None
    return np.array([reader.label(row) for row in range(reader.num_samples)], np.int64)


def check_images(
    images: Images, rows: range, opened: Callable[[pathlib.Path], Decode], moved: Callable[[], None]
) -> list[str]:
    """Decode some images of a shard; return a line for each that can't be. moved is called after each."""
    try:
        with boundary(images.path):
            decode = opened(images.path)
    except DataError as error:  # it was sound a moment ago
        return [str(error)]
    problems = []
    for row in rows:
        try:
            decode(row)
        except Exception as error:
            problems.append(f"{sample_name(images.path, row, images.names)}: {reason_of(error)}")
        moved()
    return problems


def open_images(path: pathlib.Path) -> Decode:
    """Return what decodes the samples of a shard, which is open as long as that lives. Raises DataError, OSError."""
    if path.suffix == ".tar":
        tar = TarShardReader(path)

        def decode_member(row: int) -> np.ndarray:
            sample = tar.sample(row)
            return decode_rgb(tar.image_bytes(sample), None, 1) if sample.is_png else jpeg.decode(tar.image(sample))

        return decode_member
    reader = BetonReader(path)

    def decode(row: int) -> None:
        start, size = int(reader.pointer_N[row]), int(reader.size_N[row])
        if reader.mode_N[row] == MODE_RAW:
            return  # its size was checked with the structure
        check_size(int(reader.height_N[row]), int(reader.width_N[row]))
        pixels_HW3 = np.empty((int(reader.height_N[row]), int(reader.width_N[row]), 3), np.uint8)
        jpeg.decode_into(reader.data.ctypes.data + start, size, *pixels_HW3.shape[:2], pixels_HW3.ctypes.data)

    return decode


def unknown_files(folder: pathlib.Path | RemoteFolder, there: Iterable[str], manifest: Manifest) -> list[str]:
    """Return a problem for each name in a folder that looks like a part of a data set but is not in the manifest."""
    known = {file.name for file in manifest.files()}
    endings = (*EXTENSION.values(), ".idx", NAMES_EXTENSION, ".tmp", SKIPPED_FILE)
    names = sorted(name for name in there if name.endswith(endings) and name not in known)
    return [f"{folder}/{name}: not in {FILE_NAME}" for name in names]


def verify(config: VerifyConfig) -> list[str]:
    """Return the problems of a data set; ManifestError if there is no readable manifest, and no .beton file either."""
    path = local_path(config.out)
    if is_remote(path):
        return _verify_remote(config)
    folder = pathlib.Path(path)
    converted = any((folder / name).exists() for name in (FILE_NAME, STATE_FILE))
    if not converted and (files := beton_files(folder)):
        return _verify_betons(config, files)
    manifest = Manifest.load(folder)
    shards = _chosen(config, [shard for group in manifest.splits.values() for shard in group])
    counts = {split: ClassCounts(len(manifest.classes)) for split in manifest.splits}
    counts_of = {shard.name: counts[split] for split, of_split in manifest.splits.items() for shard in of_split}
    check = functools.partial(check_shard, folder)
    whole = [Task(s.name, s.num_samples, functools.partial(check, counts_of[s.name], s)) for s in shards]
    found = list(_results(config, "files", whole, Watch("shard", str)))
    problems = [*unknown_files(folder, os.listdir(folder), manifest), *itertools.chain.from_iterable(found)]
    if manifest.skips and manifest.skips.file:
        problems += _check_file(folder, manifest.skips.file)
    if not any(found) and len(shards) == sum(map(len, manifest.splits.values())):
        problems += _check_counts(manifest, counts)
    if config.deep:
        sound = [shard for shard, lines in zip(shards, found, strict=True) if not lines]
        names = {shard.name: folder / shard.names.name if shard.names else None for shard in sound}
        problems += _decode_all(config, [Images(folder / s.name, s.num_samples, names[s.name]) for s in sound])
    return problems


def _verify_remote(config: VerifyConfig) -> list[str]:
    """Return the problems of a set that is far away: what one listing tells of the files that its manifest names.

    Raises:
        UserError, RunError, ManifestError: it can't be listed, has no readable manifest, or has to be copied first.
    """
    shown = without_secrets(config.out)
    if config.deep or is_http(config.out):
        reason = "--deep reads every byte" if config.deep else "over HTTP a folder can't be listed"
        raise UserError(f"{shown}: {reason}: copy it to this machine first")
    out = RemoteFolder(config.out)
    manifest = out.read_manifest()
    if manifest is None:
        raise ManifestError(f"{out} is not a converted data set, or not finished (no {FILE_NAME})")
    note("sizes are compared, and no content: a shard's checksum is when it is fetched to be read")
    if config.sample:
        note("--sample: one listing tells of all files, so all are compared")
    problems = unknown_files(out, out.names(), manifest)
    for file in manifest.files():
        try:
            if (size := out.num_bytes(file.name)) != file.num_bytes:
                problems.append(f"{out}/{file.name}: {size} bytes, but the manifest says {file.num_bytes}")
        except FileNotFoundError:
            problems.append(f"{out}/{file.name}: missing")
    return problems


def _chosen(config: VerifyConfig, found: list[AnyShard]) -> list[AnyShard]:
    """Return the shards that are checked, and say so where these are not all."""
    if not 0 < config.sample < len(found):
        return found
    note(f"{config.sample} of {len(found)} shards are checked, evenly spread")
    return [found[place] for place in spread(len(found), config.sample)]


def _verify_betons(config: VerifyConfig, files: list[pathlib.Path]) -> list[str]:
    """Return the problems of FFCV's own files: their structure, and with --deep their images."""
    note("no manifest, so there is no checksum to compare")
    files = _chosen(config, files)
    sizes: dict[pathlib.Path, int] = {}

    def check(file: pathlib.Path) -> list[str]:
        try:
            sizes[file] = BetonReader(file).num_samples
        except (DataError, OSError) as error:
            return [str(error)]
        return []

    tasks = [Task(file.name, 1, functools.partial(check, file)) for file in files]
    problems = list(itertools.chain.from_iterable(_results(config, "files", tasks, Watch("shard", str))))
    if config.deep:
        problems += _decode_all(config, [Images(file, sizes[file], None) for file in files if file in sizes])
    return problems


def _decode_all(config: VerifyConfig, parts: list[Images]) -> list[str]:
    """Return the problems of the images of sound files."""
    watch: Watch[str] = Watch("image", str)
    opened = functools.lru_cache(OPEN_SHARDS)(open_images)

    def task(images: Images, start: int) -> Task:
        rows = range(start, min(start + IMAGES_AT_ONCE, images.num_samples))
        return Task(images.path.name, len(rows), lambda: check_images(images, rows, opened, watch.moved))

    tasks = [task(images, start) for images in parts for start in range(0, images.num_samples, IMAGES_AT_ONCE)]
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
        print(printable(problem))
    print(json.dumps({"ok": not problems, "problems": problems}), flush=True)
    return EXIT_PROBLEMS if problems else 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: verify_command(parse(VerifyConfig, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
