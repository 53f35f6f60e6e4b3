"""Samples in compact columns: what a folder, an archive or a table of images lists."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import numpy as np

from fasttrain.system.columns import Column
from fasttrain.system.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_OTHER_FORMATS = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ppm", ".pgm", ".tga", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z")

# A larger file is no photograph: it is reported and never read.
MAX_FILE_BYTES = 1 << 28

# Rows from here and there of a listing on a disk: each brings 64 KiB of every column into memory.
_ROWS_AT_ONCE, _TAKEN_AT_ONCE = 1 << 11, 1 << 8
_NAMED, _REASONS, _SHOWN = 20, 50, 8  # in Unused: names of a reason, reasons, those of them in a line


class SourceError(DataError):
    """The source, or one sample of it, cannot be used; the text is one line."""


class Unused:
    """What a source holds and does not use: for each reason a count and the first names, whatever the number.

    Attributes:
        reasons: reason -> [count, the first names].
    """

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count something; a name may stand for several. Beyond 50 different reasons all others count as one."""
        if reason not in self.reasons and len(self.reasons) >= _REASONS:
            reason = "other"
        before, names = self.reasons.get(reason, (0, []))
        self.reasons[reason] = (before + count, [*names, name] if len(names) < _NAMED else names)

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def content(self) -> list[dict[str, Any]]:
        """Return it as the manifest records it, {"reason": ..., "count": ..., "first": [names]} each, sorted."""
        found = sorted(self.reasons.items())
        return [{"reason": reason, "count": count, "first": names} for reason, (count, names) in found]

    def __str__(self) -> str:
        """One line: counts, each with its first name; "" if there is nothing."""
        if not self.reasons:
            return ""
        parts = [f"{reason}: {count}, first {names[0]}" for reason, (count, names) in sorted(self.reasons.items())]
        more = [f"and {len(parts) - _SHOWN} other kinds"] if len(parts) > _SHOWN else []
        return f"not used: {'; '.join([*parts[:_SHOWN], *more])}"


def other_file(name: str) -> str:
    """Return why a file is not used that is not among the images of a source, by its extension."""
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return f"images beside what is read ({extension})"
    if extension in _OTHER_FORMATS:
        return f"pictures of a format that is not read ({extension})"
    if extension in _ARCHIVES:
        return f"archives inside ({extension})"
    return f"files that are no images ({extension[:16] or 'no extension'})"


class Sample(NamedTuple):
    """One image: its name (forward slashes), its label (-1 = none), and numbers by which a Reader finds it."""

    path: str
    label: int
    place: tuple[int, ...] = ()


class Listing(Sequence[Sample]):
    """Samples in columns: the bytes of a name, 12 for name and label, 8 for each number of a place.

    A column of more than 64 MiB lies on a disk (fasttrain.system.columns). The order takes 8 bytes more once it is
    another than that of the samples as they came.

    Attributes:
        label_N: int32, -1 = none.
        place_NK: int64.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """Take samples one by one; all have places of the same length. RunError where they don't fit on the disk."""
        self._columns = Column("B"), Column("q"), Column("i"), Column("q")
        names, ends, labels, places = (column.tail for column in self._columns)
        ends.append(0)
        count = end = 0
        for count, sample in enumerate(samples, 1):
            name = sample.path.encode("utf-8", "surrogatepass")  # of any text, whatever the locale
            names += name
            end += len(name)
            ends.append(end)
            labels.append(sample.label)
            places.extend(sample.place)
            if count % _ROWS_AT_ONCE == 0:
                for column in self._columns:
                    column.settle()
        # Arrays of the standard library: taking one number out of numpy's is ten times slower.
        self._names, self._ends, self._labels, self._places = (column.values() for column in self._columns)
        self._per_place = len(self._places) // count if count else 0
        self._rows: np.ndarray | None = None  # all, as they came

    def take(self, index_N: np.ndarray) -> Listing:
        """Return the samples at these positions, which are not negative, in this order; the columns are shared."""
        return self._with(_rows=index_N if self._rows is None else self._rows[index_N])

    def labelled(self, blocks: Iterable[np.ndarray]) -> Listing:
        """Return the same samples with other labels, given in blocks; only before any `take`."""
        column = Column("i")
        for label_N in blocks:
            column.extend(label_N)
        values = column.values()
        assert self._rows is None
        assert len(values) == len(self)
        return self._with(_labels=values, _columns=(*self._columns[:2], column, self._columns[3]))

    def unlabelled(self) -> Listing:
        """Return the same samples without labels; only before any `take`."""
        parts = (min(_ROWS_AT_ONCE, len(self) - start) for start in range(0, len(self), _ROWS_AT_ONCE))
        return self.labelled(np.full(size, -1) for size in parts)

    def _with(self, **columns: object) -> Listing:
        other = object.__new__(Listing)
        other.__dict__.update(self.__dict__, **columns)
        return other

    @property
    def label_N(self) -> np.ndarray:
        return self._of_rows(np.frombuffer(self._labels, np.int32) if len(self._labels) else np.zeros(0, np.int32))

    @property
    def place_NK(self) -> np.ndarray:
        if not self._per_place:
            return np.zeros((len(self), 0), np.int64)
        return self._of_rows(np.frombuffer(self._places, np.int64).reshape(-1, self._per_place))

    def labels(self) -> Iterator[np.ndarray]:
        """Yield label_N, some at a time."""
        return (part.label_N for part in self.parts())

    def places(self) -> Iterator[np.ndarray]:
        """Yield place_NK, some rows at a time."""
        return (part.place_NK for part in self.parts())

    def parts(self) -> Iterator[Listing]:
        """Yield all samples, some at a time; what these take of memory is let go of."""
        on_disk = any(column.on_disk for column in self._columns)
        step = _ROWS_AT_ONCE if self._rows is None or not on_disk else _TAKEN_AT_ONCE
        for start in range(0, len(self), step):
            yield self[start : start + step]
            for column in self._columns:
                column.release()

    def _of_rows(self, column_N: np.ndarray) -> np.ndarray:
        return column_N if self._rows is None else column_N[self._rows]

    def __len__(self) -> int:
        return len(self._labels) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Listing: ...

    def __getitem__(self, index: int | slice) -> Sample | Listing:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        row = range(len(self))[index] if self._rows is None else int(self._rows[index])
        first = row * self._per_place
        place = tuple(self._places[first : first + self._per_place])
        return Sample(self._name(self._ends[row], self._ends[row + 1]), self._labels[row], place)

    def _name(self, start: int, end: int) -> str:
        return str(self._names[start:end], "utf-8", "surrogatepass")

    def __reduce__(self) -> tuple[type[Listing], tuple[list[Sample]]]:
        return Listing, (list(self),)  # the samples taken, without the columns they are taken from

    def __iter__(self) -> Iterator[Sample]:
        for part in self.parts():
            row_N, end_N = cast("np.ndarray", part._rows), np.frombuffer(self._ends, np.int64)
            names = map(self._name, end_N[row_N].tolist(), end_N[row_N + 1].tolist())
            places = zip(*part.place_NK.T.tolist(), strict=True) if self._per_place else itertools.repeat(())
            yield from map(Sample, names, part.label_N.tolist(), places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # type: ignore[assignment]


def listing_digests(
    classes: Sequence[str],
    splits: Mapping[str, Listing],
    states: Callable[[Sample], Sequence[object]],
    files: Sequence[tuple[str, Sequence[object]]] = (),
    count: int = 2,
) -> list[str]:
    """Return SHA-256 (hex) of classes, files with their states, and every sample's split, path, label and state.

    states: of a sample, one for each of `count` digests, as those of files, of which several may have one name.
    """
    digests = [hashlib.sha256("\0".join(classes).encode("utf-8", "surrogatepass")) for _ in range(count)]
    for name, of_file in files:
        for digest, state in zip(digests, of_file, strict=True):
            digest.update(f"{name}\0{state}\n".encode("utf-8", "surrogatepass"))
    for split, samples in splits.items():
        for part in samples.parts():
            lines: list[list[str]] = [[] for _ in digests]
            for sample in part:
                start = f"{split}\0{sample.path}\0{sample.label} "
                for line, state in zip(lines, states(sample), strict=True):
                    line.append(f"{start}{state}\n")
            for digest, line in zip(digests, lines, strict=True):
                digest.update("".join(line).encode("utf-8", "surrogatepass"))
    return [digest.hexdigest() for digest in digests]


def file_states(path: str) -> tuple[str, str]:
    """Return the size of a file, and size and time of change, as text; "unreadable" for none."""
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: the conversion reports and skips it
        return "unreadable", "unreadable"
    return f"{status.st_size}", f"{status.st_size} {status.st_mtime_ns}"
