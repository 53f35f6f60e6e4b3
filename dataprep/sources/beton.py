"""FFCV's .beton files, stock ones or converted shards, as a source: JPEG streams as they lie, or pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.labels import number_labels
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.beton_set import open_betons
from fasttrain.formats.image import check_size
from fasttrain.formats.listing import MAX_FILE_BYTES, Listing, Sample, SourceError, Unused
from fasttrain.formats.manifest import FILE_NAME, Manifest
from fasttrain.formats.names import read_names
from fasttrain.system.errors import DataError, note


class StoredReader(NamedTuple):
    """Reads samples of .beton files; place = (file, pointer, size, height, width), the last two 0 for a JPEG."""

    files: tuple[str, ...]

    def read(self, sample: Sample) -> bytes | np.ndarray:
        file, pointer, size, height, width = sample.place
        if not height and size > MAX_FILE_BYTES:
            raise SourceError(f"larger than {MAX_FILE_BYTES} bytes")
        check_size(height, width)
        stream = read_range(self.files[file], pointer, size)
        return np.frombuffer(stream, np.uint8).reshape(height, width, 3) if height else stream

    def size(self, sample: Sample) -> int:
        return sample.place[2]


def beton_source(root: Path) -> Source:
    """List the samples of a .beton file, or of a folder of them. Raises DataError, OSError.

    A folder with our manifest has its splits, classes and names of samples; others have numbers as classes.
    """
    if (root / FILE_NAME).exists():
        return _converted_source(root)
    found = open_betons(root)
    files = [reader.path for readers in found.splits.values() for reader in readers]
    listings, values = {}, {}
    for split, readers in found.splits.items():
        parts = [(files.index(reader.path), reader.path, None) for reader in readers]
        listings[split], values[split] = _listed(parts)
    classes, labels = number_labels(values)
    splits = {split: listing.labelled(labels[split]) for split, listing in listings.items()}
    return _source(root, classes, splits, files, found.unused)


def _converted_source(root: Path) -> Source:
    manifest = Manifest.load(root)
    if manifest.format != "ffcv":
        raise SourceError(f"{root}: holds no .beton shards")
    manifest.check_shards(root)
    splits, files = {}, list[Path]()
    for split, shards in manifest.splits.items():
        names = [root / shard.names.name if shard.names else None for shard in shards]
        parts = [(len(files) + n, root / shard.name, names[n]) for n, shard in enumerate(shards)]
        listing, label_N = _listed(parts)
        if np.any((label_N < -1) | (label_N >= len(manifest.classes))):
            raise SourceError(f"{root}: a label is none of the {len(manifest.classes)} classes: run dataprep/verify.py")
        splits[split] = listing.labelled([label_N])
        files += [file for _, file, _ in parts]
    return _source(root, tuple(manifest.classes), splits, files, Unused())


def _source(
    root: Path, classes: tuple[str, ...], splits: dict[str, Listing], files: list[Path], unused: Unused
) -> Source:
    paths = tuple(map(str, files))
    return Source(root, classes, splits, StoredReader(paths), paths, in_sequence=True, unused=unused)


def _listed(parts: Sequence[tuple[int, Path, Path | None]]) -> tuple[Listing, np.ndarray]:
    """Return the samples and the labels of files, each given with its number and perhaps its file of names.

    One is open at a time: there may be more than a process may open.
    """
    labels = []

    def samples() -> Iterator[Sample]:
        for number, file, names in parts:
            reader = BetonReader(file)
            labels.append(reader.label_N)
            raw_N = reader.mode_N == MODE_RAW
            columns = (reader.pointer_N, reader.size_N, reader.height_N * raw_N, reader.width_N * raw_N)
            rows = zip(*(column_N.tolist() for column_N in columns), strict=True)
            for name, place in zip(_names(file, names, reader.num_samples), rows, strict=True):
                yield Sample(name, -1, (number, *place))

    return Listing(samples()), np.concatenate(labels)


def _names(file: Path, names: Path | None, count: int) -> Iterable[str]:
    if names:
        try:
            return read_names(names, count)
        except (DataError, OSError) as error:
            note(f"samples of {file} go without their names: {error}")
    return (f"{file.name}/{row}" for row in range(count))
