"""Label values of any kind as numbers of classes: for tables, arrays and WebDatasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fasttrain.formats.listing import SourceError
from fasttrain.system.columns import Column

# Whole numbers below it are labels as they stand; others, like identifiers, are numbered in their order.
MAX_LABEL = 1 << 16
# More text than this names no classes: every image has a text of its own, or the source is an attack.
MAX_NAMES_BYTES = 1 << 26
Value = int | str | None
_DIGITS = re.compile(r"-?[0-9]+")
_SETTLED_EVERY = 1 << 16


class NoClasses(SourceError):
    """Labels that are no classes."""


class Each:
    """A number for each image, in blocks: number_V, or what number_V holds for the value of each."""

    def __init__(self, number_V: np.ndarray, row: Column | None = None) -> None:
        self.number_V, self._row = number_V, row

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.number_V.__getitem__, self._row.blocks()) if self._row else iter([self.number_V])

    def of(self, number_V: np.ndarray) -> Each:
        """Return the same with other numbers."""
        return Each(number_V, self._row)


class Labels:
    """Label values of images in their order: each value once, and 4 bytes an image, on a disk where it is a long one.

    Attributes:
        unreadable: how many could not be read.
        first_unreadable: of which image the first of them is, and why.
    """

    def __init__(self, values: Iterable[Value] = ()) -> None:
        """Take values one by one; SourceError as for append."""
        self._rows: dict[Value, int] = {}
        self._row_of_each, self._count = Column("i"), 0
        self._append = self._row_of_each.tail.append
        self._text_bytes = 0
        self.unreadable, self.first_unreadable = 0, ""
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return self._count

    def append(self, value: Value) -> None:
        """Add the label of one image; SourceError for more than MAX_NAMES_BYTES of different texts."""
        self._append(self._row(value))
        self._count += 1
        if self._count % _SETTLED_EVERY == 0:
            self._row_of_each.settle()

    def count_unreadable(self, where: str, reason: object) -> None:
        """Count an image whose label is no class."""
        self.first_unreadable = self.first_unreadable or f"{where}: {reason}"
        self.unreadable += 1

    def missing(self) -> np.ndarray:
        """Return the positions of the images without a label."""
        row, at, found = self._rows.get(None, -1), 0, [np.zeros(0, np.int64)]
        for row_N in self._row_of_each.blocks():
            found.append(at + np.flatnonzero(row_N == row))
            at += len(row_N)
        return np.concatenate(found)

    def replace(self, position: int, value: Value) -> None:
        """Give the image at a position another label; SourceError as for append."""
        self._row_of_each.replace(position, self._row(value))

    def extend(self, values: Sequence[Value], index_N: np.ndarray) -> None:
        """Add the labels values[index] of several images; SourceError as for append."""
        row_V = np.array([self._row(value) for value in values], np.int32)
        self._row_of_each.extend(row_V[index_N])
        self._count += len(index_N)

    def _row(self, value: Value) -> int:
        if value not in self._rows and isinstance(value, str):
            self._text_bytes += len(value)
            if self._text_bytes > MAX_NAMES_BYTES:
                raise NoClasses(f"the labels hold more than {MAX_NAMES_BYTES} bytes of different texts")
        return self._rows.setdefault(value, len(self._rows))

    def texts(self) -> set[str]:
        """Return the different values as text, without None."""
        return {str(value) for value in self._rows if value is not None}

    def numbers(self) -> Each:
        """Return the values as int64, None as -1; ValueError or OverflowError if one is no such number.

        Text counts as a number if it is plain digits, and no other text gives the same: 1_0 and 10, or 1 and 01, are
        names.
        """
        texts = self.texts()
        if not all(map(_DIGITS.fullmatch, texts)) or len(set(map(int, texts))) < len(texts):
            raise ValueError("names, not numbers")
        number_V = np.array([-1 if value is None else int(value) for value in self._rows], np.int64)
        return Each(number_V, self._row_of_each)

    def indices(self, index: Mapping[str, int]) -> Each:
        """Return the int32 index of each value's text, -1 for None."""
        number_V = np.array([-1 if value is None else index[str(value)] for value in self._rows], np.int32)
        return Each(number_V, self._row_of_each)


def label_notes(values: Iterable[Labels | np.ndarray]) -> list[str]:
    """Return a sentence about labels that could not be read, [] if there are none."""
    found = [group for group in values if isinstance(group, Labels) and group.unreadable]
    if not found:
        return []
    count, first = sum(group.unreadable for group in found), found[0].first_unreadable
    return [f"{count} labels are no classes, so their images have none; the first is of {first}"]


def decoded(name: object) -> str:
    """Return a name as text. Bytes that are no UTF-8 are escaped: replaced, two names could become one."""
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


def number_labels(
    values: Mapping[str, Labels | np.ndarray], names: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, Each]]:
    """Return class names, and by split the int32 label of every value (None and negative numbers: -1).

    Whole numbers (an array holds nothing else) are labels as they stand, and index names where these are given; text
    that spells whole numbers counts as numbers; other values are numbered in sorted order.

    Raises:
        SourceError: a number that names do not reach.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        return _numbered_texts(values)
    top = max((int(group.number_V.max(initial=-1)) for group in numbers.values()), default=-1)
    if names and top >= len(names):
        raise SourceError(f"label {top}, but only {len(names)} class names")
    if top >= MAX_LABEL:
        known_N = np.unique(np.concatenate([group.number_V for group in numbers.values()]))
        known_N = known_N[known_N >= 0]
        classes = tuple(map(str, known_N.tolist()))
        numbers = {
            split: group.of(np.where(group.number_V < 0, -1, np.searchsorted(known_N, group.number_V)))
            for split, group in numbers.items()
        }
    else:
        classes = tuple(names) if names and top >= 0 else tuple(map(str, range(top + 1)))
    return classes, {
        split: group.of(np.maximum(group.number_V, -1).astype(np.int32)) for split, group in numbers.items()
    }


def _as_numbers(values: Mapping[str, Labels | np.ndarray]) -> dict[str, Each] | None:
    try:
        return {split: group.numbers() if isinstance(group, Labels) else Each(group) for split, group in values.items()}
    except (ValueError, OverflowError):
        return None


def _numbered_texts(values: Mapping[str, Labels | np.ndarray]) -> tuple[tuple[str, ...], dict[str, Each]]:
    # A split of numbers beside one of text: its numbers are names, too.
    texts = {split: group if isinstance(group, Labels) else _named(group) for split, group in values.items()}
    known = sorted(set[str]().union(*(group.texts() for group in texts.values())))
    index = {text: number for number, text in enumerate(known)}
    return tuple(known), {split: group.indices(index) for split, group in texts.items()}


def _named(number_N: np.ndarray) -> Labels:
    return Labels(None if number < 0 else number for number in number_N.tolist())


def whole_numbers(value_N: np.ndarray) -> np.ndarray:
    """Return numbers of any type as int64; SourceError if one is not whole."""
    with np.errstate(invalid="ignore"):  # not-a-number and infinity, which the comparison finds
        number_N = value_N.astype(np.int64)
    if not np.array_equal(number_N, value_N):
        raise SourceError(f"{value_N[number_N != value_N][0]} is no whole number")
    return number_N
