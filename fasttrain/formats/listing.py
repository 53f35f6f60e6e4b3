"""Samples in compact columns: what a folder, an archive or a table of images lists."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import numpy as np

from fasttrain.system.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_OTHER_FORMATS = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ppm", ".pgm", ".tga", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z")

# A larger file is no photograph: it is reported and never read.
MAX_FILE_BYTES = 1 << 28

_ROWS_AT_ONCE = 1 << 12
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
    """Samples in columns: the bytes of a name, 20 for name, label and order, 8 for each number of a place.

    Attributes:
        label_N: int32, -1 = none.
        place_NK: int64.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """Take samples one by one; all have places of the same length."""
        names, ends, labels, places = bytearray(), array("q", [0]), array("i"), array("q")
        for sample in samples:
            names += sample.path.encode("utf-8", "surrogatepass")  # of any text, whatever the locale
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
        name = self._names[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass")
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


def listing_digest(
    classes: Sequence[str],
    splits: Mapping[str, Listing],
    state: Callable[[Sample], object],
    files: Iterable[tuple[str, object]] = (),
) -> str:
    """Return the SHA-256 (hex) of classes, files with their states, and every sample's split, path, label and state.

    files: several may have one name.
    """
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogatepass"))
    for name, file in files:
        digest.update(f"{name}\0{file}\n".encode("utf-8", "surrogatepass"))
    for split, samples in splits.items():
        for sample in samples:
            line = f"{split}\0{sample.path}\0{sample.label} {state(sample)}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def file_state(path: str, times: bool = False) -> str:
    """Return the size of a file, with its time of change if asked for, as text; "unreadable" for none."""
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: the conversion reports and skips it
        return "unreadable"
    return f"{status.st_size} {status.st_mtime_ns}" if times else f"{status.st_size}"
