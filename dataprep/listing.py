"""What a source is made of: samples, kept in compact columns, and how a worker reads one of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, overload

import numpy as np

from fasttrain.dataprep import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Names taken as the validation split beside `train`; the first that exists is used.
VAL_NAMES = ("val", "valid", "validation", "test")
# A larger file is no photograph: it is reported and never read.
MAX_FILE_BYTES = 1 << 28
_ROWS_AT_ONCE = 1 << 12


class SourceError(DataError):
    """The source, or one sample of it, cannot be used; the text is one line."""


class Sample(NamedTuple):
    """One image: its name (forward slashes), its label (-1 = none), and numbers by which a Reader finds it."""

    path: str
    label: int
    place: tuple[int, ...] = ()


class Reader(Protocol):
    """Reads the samples of one source, in several threads at once; sent to Ray's workers, so it holds no open file."""

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
        # Arrays of the standard library: taking one number out of numpy's is ten times slower.
        self._names, self._ends, self._labels, self._places = names, ends, labels, places
        self._per_place = len(places) // len(labels) if labels else 0
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
        labelled.__dict__.update(self.__dict__, _labels=array("i", label_N.astype(np.int32).tobytes()))
        return labelled

    @property
    def label_N(self) -> np.ndarray:
        return np.frombuffer(self._labels, np.int32)[self._rows] if self._labels else np.zeros(0, np.int32)

    @property
    def place_NK(self) -> np.ndarray:
        if not self._per_place:
            return np.zeros((len(self), 0), np.int64)
        return np.frombuffer(self._places, np.int64).reshape(-1, self._per_place)[self._rows]

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
        first = row * self._per_place
        return Sample(name, self._labels[row], tuple(self._places[first : first + self._per_place]))

    def __reduce__(self) -> tuple[type[Listing], tuple[list[Sample]]]:
        return Listing, (list(self),)  # the samples taken, without the columns they are taken from

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from map(self._sample, self._rows[start : start + _ROWS_AT_ONCE].tolist())

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
