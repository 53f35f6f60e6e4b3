"""Splits by file name, and label values of any kind as numbers of classes: for tables, arrays and WebDatasets."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fasttrain.formats.listing import VAL_NAMES, SourceError

# Whole numbers below it are labels as they stand; others, like identifiers, are numbered in their order.
MAX_LABEL = 1 << 16
# More text than this names no classes: every image has a text of its own, or the source is an attack.
MAX_NAMES_BYTES = 1 << 26
Value = int | str | None


class Labels:
    """Label values of images in their order: each value once, and 4 bytes an image."""

    def __init__(self, values: Iterable[Value] = ()) -> None:
        """Take values one by one; SourceError as for append."""
        self._rows: dict[Value, int] = {}
        self._row_of_each = array("i")
        self._text_bytes = 0
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._row_of_each)

    def append(self, value: Value) -> None:
        """Add the label of one image; SourceError for more than MAX_NAMES_BYTES of different texts."""
        self._row_of_each.append(self._row(value))

    def extend(self, values: Sequence[Value], index_N: np.ndarray) -> None:
        """Add the labels values[index] of several images; SourceError as for append."""
        row_V = np.array([self._row(value) for value in values], np.int32)
        self._row_of_each.frombytes(row_V[index_N].tobytes())

    def _row(self, value: Value) -> int:
        if value not in self._rows and isinstance(value, str):
            self._text_bytes += len(value)
            if self._text_bytes > MAX_NAMES_BYTES:
                raise SourceError(f"the labels hold more than {MAX_NAMES_BYTES} bytes of different texts")
        return self._rows.setdefault(value, len(self._rows))

    def texts(self) -> set[str]:
        """Return the different values as text, without None."""
        return {str(value) for value in self._rows if value is not None}

    def numbers(self) -> np.ndarray:
        """Return the values as int64, None as -1; ValueError or OverflowError if one is no such number."""
        return self._mapped([-1 if value is None else int(value) for value in self._rows], np.int64)

    def indices(self, index: Mapping[str, int]) -> np.ndarray:
        """Return the int32 index of each value's text, -1 for None."""
        return self._mapped([-1 if value is None else index[str(value)] for value in self._rows], np.int32)

    def _mapped(self, number_V: list[int], dtype: type[np.integer]) -> np.ndarray:
        """Return, for each image, what the list holds for its value."""
        return np.array(number_V, dtype)[np.array(self._row_of_each, np.int32)]


def split_files(files: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of the training and validation files by their names (`train-00000.tar`, `x_test.parquet`).

    Without any file of a training split, all files are one.
    """
    words = [re.split(r"[^a-z]+", os.path.basename(name).lower()) for name in files]
    train = [row for row, found in enumerate(words) if "train" in found]
    if not train:
        return {"train": list(range(len(files)))}
    for name in VAL_NAMES:
        if val := [row for row, found in enumerate(words) if name in found]:
            return {"train": train, "val": val}
    return {"train": train}


def number_labels(
    values: Mapping[str, Labels | np.ndarray], names: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names, and by split the int32 label of every value (None and negative numbers: -1).

    Whole numbers (an array holds nothing else) are labels as they stand, and index names where these are given; text
    that spells whole numbers counts as numbers; other values are numbered in sorted order.

    Raises:
        SourceError: a number that names do not reach.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        return _numbered_texts(values)
    top = max((int(group.max(initial=-1)) for group in numbers.values()), default=-1)
    if names and top >= len(names):
        raise SourceError(f"label {top}, but only {len(names)} class names")
    if top >= MAX_LABEL:
        known_N = np.unique(np.concatenate(list(numbers.values())))
        known_N = known_N[known_N >= 0]
        classes = tuple(map(str, known_N.tolist()))
        numbers = {s: np.where(group < 0, -1, np.searchsorted(known_N, group)) for s, group in numbers.items()}
    else:
        classes = tuple(names) if names and top >= 0 else tuple(map(str, range(top + 1)))
    return classes, {split: np.maximum(group, -1).astype(np.int32) for split, group in numbers.items()}


def _as_numbers(values: Mapping[str, Labels | np.ndarray]) -> dict[str, np.ndarray] | None:
    try:
        return {split: group.numbers() if isinstance(group, Labels) else group for split, group in values.items()}
    except (ValueError, OverflowError):
        return None


def _numbered_texts(values: Mapping[str, Labels | np.ndarray]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
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
