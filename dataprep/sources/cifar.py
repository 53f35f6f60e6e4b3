"""Arrays as a source: CIFAR-10 and CIFAR-100 batches (Python and binary version) and .npz files.

Uncompressed arrays are mapped into memory; pickles and compressed arrays are unpacked once in every process, up to
MAX_UNPACKED_BYTES.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.labels import (
    MAX_LABEL,
    MAX_NAMES_BYTES,
    Labels,
    Value,
    decoded,
    number_labels,
    whole_numbers,
)
from fasttrain.dataprep.sources.pickled import unpickled
from fasttrain.dataprep.sources.source import MAX_UNPACKED_BYTES, Source
from fasttrain.formats.listing import Listing, Sample, SourceError, Unused, other_file
from fasttrain.system.regular import open_regular, read_at_most

_CIFAR_SIDE = 32
_CIFAR_PIXELS = 3 * _CIFAR_SIDE * _CIFAR_SIDE
_TELLING_NAMES = ("data_batch_1", "data_batch_1.bin", "test_batch", "test_batch.bin", "train.bin", "meta")
_OTHER_FILES = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt", "coarse_label_names.txt")
_MAX_TEXT_BYTES = 1 << 20  # of a file of class names


def load_pickle(path: str) -> dict[str, Any]:
    """Load a pickled dictionary of arrays, lists and text; its keys as str.

    Raises:
        SourceError: damaged, or it does anything that arrays do not need.
        OSError: it can't be read, or is larger than MAX_UNPACKED_BYTES.
    """
    content = read_at_most(path, MAX_UNPACKED_BYTES)
    try:
        return {decoded(key): value for key, value in unpickled(content).items()}
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None


class CifarReader(NamedTuple):
    """Reads CIFAR images; place = (file, row, bytes before the pixels of a binary record; 0 = a pickle)."""

    files: tuple[str, ...]

    def read(self, sample: Sample) -> np.ndarray:
        file, row, header = sample.place
        if header:
            record = read_range(self.files[file], row * (header + _CIFAR_PIXELS) + header, _CIFAR_PIXELS)
            planes = np.frombuffer(record, np.uint8)
        else:
            planes = _pickled_pixels(self.files[file])[row]
        return np.ascontiguousarray(planes.reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0))

    def size(self, sample: Sample) -> int:
        return _CIFAR_PIXELS


@functools.lru_cache(maxsize=16)  # CIFAR has at most six such files
def _pickled_pixels(path: str) -> np.ndarray:
    return _pixels_of(path, load_pickle(path))


def _pixels_of(path: str, content: dict[str, Any]) -> np.ndarray:
    pixels = content.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_CIFAR_PIXELS,):
        raise SourceError(f"{path}: no array `data` of N x {_CIFAR_PIXELS} bytes")
    return pixels


def cifar_folder(root: Path) -> Path | None:
    """Return the folder that holds CIFAR batches, root or one in it, as torchvision keeps them; None if there is none.

    Raises:
        SourceError: several folders in root hold CIFAR batches.
    """
    if _cifar_files(root):
        return root
    with os.scandir(root) as entries:  # a stat of each of a million images would take longer than listing them
        inside = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    found = [path for path in inside if _looks_like_cifar(path)]
    if len(found) > 1:
        raise SourceError(f"{root}: CIFAR lies in {' and in '.join(sorted(map(str, found)))}: name one of them")
    return found[0] if found else None


def _looks_like_cifar(folder: Path) -> bool:
    # By name first: it may be one of thousands of class folders, and finding files takes reading it.
    return any(os.path.isfile(f"{folder}/{name}") for name in _TELLING_NAMES) and bool(_cifar_files(folder))


def _cifar_files(folder: Path) -> dict[str, list[Path]]:
    """Return the batches by split; {} if there are none."""
    for train, test, extra in (("data_batch_*.bin", "test_batch.bin", ""), ("data_batch_?", "test_batch", ""),
                               ("train.bin", "test.bin", ""), ("train", "test", "meta")):  # fmt: skip
        files = {"train": sorted(folder.glob(train)), "val": sorted(folder.glob(test))}
        if files["train"] and all(path.is_file() for path in files["train"]) and (folder / extra).exists():
            return {split: found for split, found in files.items() if found}
    return {}


def cifar_source(root: Path) -> Source:
    """List CIFAR-10 or CIFAR-100 (fine labels), Python or binary version. Raises SourceError, OSError."""
    folder = cifar_folder(root) if root.is_dir() else None
    if folder is None:
        raise SourceError(f"{root}: no folder of CIFAR batches")
    by_split = _cifar_files(folder)
    files = tuple(str(path) for group in by_split.values() for path in group)
    splits, values = {}, {}
    for split, group in by_split.items():
        parts = [_cifar_batch(str(path)) for path in group]
        values[split] = _joined([labels for labels, _ in parts])
        splits[split] = Listing(
            Sample(f"{path.name}/{row}", -1, (files.index(str(path)), row, header))
            for path, (labels, header) in zip(group, parts, strict=True)
            for row in range(len(labels))
        )
    classes, labels = number_labels({**values}, _cifar_classes(folder))
    labelled = {split: listing.labelled(labels[split]) for split, listing in splits.items()}
    unused = _beside(root, folder, {*files, *(str(folder / name) for name in _OTHER_FILES)})
    notes = [f"CIFAR is read from {folder}"] if folder != root and unused.count else []
    return Source(root, classes, labelled, CifarReader(files), files, unused=unused, notes=notes)


def _beside(root: Path, folder: Path, used: set[str]) -> Unused:
    """Return what lies in the folder of the batches beside them, and beside that folder."""
    unused = Unused()
    for path in sorted({*folder.iterdir(), *root.iterdir()} - {folder}):
        if str(path) not in used and not path.name.startswith("."):
            unused.add(
                "folders beside CIFAR's" if path.is_dir() else other_file(path.name), str(path.relative_to(root))
            )
    return unused


def _cifar_batch(path: str) -> tuple[Sequence[Value] | np.ndarray, int]:
    """Return the labels of a batch, and the bytes before the pixels of each record (0: a pickle)."""
    if not path.endswith(".bin"):
        content = load_pickle(path)
        count = len(_pixels_of(path, content))
        labels = _pickled_labels(path, content.get("fine_labels", content.get("labels", ())))
        if len(labels) != count:
            raise SourceError(f"{path}: {count} images, but {len(labels)} labels")
        return labels, 0
    header = 2 if Path(path).name in ("train.bin", "test.bin") else 1
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size % (header + _CIFAR_PIXELS) or not size:
            raise SourceError(f"{path}: empty or truncated: {size} bytes are no images of {header + _CIFAR_PIXELS}")
        records = np.memmap(file, np.uint8, "r").reshape(-1, header + _CIFAR_PIXELS)
    return records[:, header - 1].astype(np.int64), header


def _pickled_labels(path: str, values: object) -> Sequence[Value] | np.ndarray:
    """Return labels: numbers, names, or None where an image has none."""
    if isinstance(values, np.ndarray) and values.ndim and values.size == len(values) and values.dtype.kind in "biu":
        return whole_numbers(values.reshape(-1))
    if not isinstance(values, list | tuple):
        raise SourceError(f"{path}: the labels are no list of numbers or names")
    if odd := {type(value) for value in values} - {int, bool, str, bytes, type(None)}:
        raise SourceError(f"{path}: a label is {odd.pop().__name__}, neither a number nor a name")
    if sum(len(value) for value in values if isinstance(value, str | bytes)) > MAX_NAMES_BYTES:
        raise SourceError(f"{path}: the labels hold more than {MAX_NAMES_BYTES} bytes of text")
    return [decoded(value) if isinstance(value, bytes) else value for value in values]


def _joined(parts: Sequence[Sequence[Value] | np.ndarray]) -> Labels | np.ndarray:
    """Return the labels of several batches as one."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    return Labels(v for part in parts for v in (part.tolist() if isinstance(part, np.ndarray) else part))


def _cifar_classes(folder: Path) -> list[str]:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).exists():
            return read_at_most(folder / name, _MAX_TEXT_BYTES).decode("utf-8", "replace").split()
    for name, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        if (folder / name).exists():
            return _names(folder / name, load_pickle(str(folder / name)).get(key, ()))
    return []


def _names(path: Path, values: object) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, str | bytes) for value in values):
        raise SourceError(f"{path}: the class names are no list of names")
    # The same long text may stand there again and again.
    if len(values) > MAX_LABEL or sum(map(len, values)) > _MAX_TEXT_BYTES:
        raise SourceError(f"{path}: more than {_MAX_TEXT_BYTES} bytes of class names, or {MAX_LABEL} of them")
    return [decoded(value) for value in values]
