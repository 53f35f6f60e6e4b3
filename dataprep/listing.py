"""What a source is made of: samples, kept in compact columns, and how a worker reads one of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, overload

import numpy as np

from dataprep import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Names taken as the validation split beside `train`; the first that exists is used.
VAL_NAMES = ("val", "valid", "validation", "test")
# A larger file inside an archive or a table is no photograph: it is reported and never read.
MAX_FILE_BYTES = 1 << 28


class SourceError(DataError):
    """The source, or one sample of it, cannot be used; the text is one line."""


class Sample(NamedTuple):
    """One image: its name (forward slashes), its label (-1 = none), and numbers by which a Reader finds it."""

    path: str
    label: int
    place: tuple[int, ...] = ()


class Reader(Protocol):
    """Reads the samples of one source; sent to the worker processes, so it holds no open file when pickled."""

    def read(self, sample: Sample) -> bytes | np.ndarray:
        """Return the bytes of an image file, or pixels (H, W, 3) uint8; OSError or DataError if it can't be read."""

    def size(self, sample: Sample) -> int:
        """Return about how many bytes that is, by which work is divided."""


class Listing(Sequence[Sample]):
    """Samples in columns: the bytes of a name, 20 for name, label and order, 8 for each number of a place.

    Attributes:
        label_N: int32, -1 = none.
        place_NK: int64.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """Take samples one by one; all have places of the same length."""
        names, ends, labels, places = bytearray(), array("q", [0]), array("i"), array("q")
        for sample in samples:
            names += os.fsencode(sample.path)
            ends.append(len(names))
            labels.append(sample.label)
            places.extend(sample.place)
        self._names, self._ends = names, np.frombuffer(ends, np.int64)
        self._labels = np.frombuffer(labels, np.int32) if labels else np.zeros(0, np.int32)
        self._places = np.array(places, np.int64).reshape(len(labels), -1) if labels else np.zeros((0, 0), np.int64)
        self._rows = np.arange(len(labels), dtype=np.int64)

    def take(self, index_N: np.ndarray) -> Listing:
        """Return the samples at these positions, in this order; the columns are shared."""
        taken = object.__new__(Listing)
        taken.__dict__.update(self.__dict__, _rows=self._rows[index_N])
        return taken

    def labelled(self, label_N: np.ndarray) -> Listing:
        """Return the same samples with other labels; only before any `take`."""
        assert len(label_N) == len(self._labels) == len(self._rows)
        labelled = object.__new__(Listing)
        labelled.__dict__.update(self.__dict__, _labels=np.ascontiguousarray(label_N, np.int32))
        return labelled

    @property
    def label_N(self) -> np.ndarray:
        return self._labels[self._rows]

    @property
    def place_NK(self) -> np.ndarray:
        return self._places[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Listing: ...

    def __getitem__(self, index: int | slice) -> Sample | Listing:
        if isinstance(index, slice):
            return self.take(cast("Any", index))
        return self._sample(int(self._rows[index]))

    def _sample(self, row: int) -> Sample:
        name = os.fsdecode(bytes(self._names[self._ends[row] : self._ends[row + 1]]))
        return Sample(name, int(self._labels[row]), tuple(self._places[row].tolist()))

    def __reduce__(self) -> tuple[type[Listing], tuple[list[Sample]]]:
        return Listing, (list(self),)  # the samples taken, without the columns they are taken from

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(int(row)) for row in self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # type: ignore[assignment]


class Groups(NamedTuple):
    """Samples that can only be read together: the group of each sample, and what reading a group costs in bytes."""

    group_N: np.ndarray
    bytes_G: np.ndarray


@dataclass(frozen=True)
class Source:
    """The images of one data set.

    Attributes:
        root: the file or folder it comes from.
        classes: class names; a label is an index into them (empty: no labels).
        splits: "train" and perhaps "val", each in a fixed order.
        reader: gives the content of a sample.
        files: what the samples lie in; empty if each is a file of its own below root.
        skipped: what cannot be used and is not among the samples, as {"path": ..., "reason": ...}.
        groups: by split, where samples are read in groups.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    reader: Reader
    files: tuple[str, ...] = ()
    skipped: list[dict[str, str]] = field(default_factory=list)
    groups: dict[str, Groups] = field(default_factory=dict)
