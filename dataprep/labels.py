"""Splits by file name, and label values of any kind as numbers of classes: for tables, arrays and WebDatasets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dataprep.listing import VAL_NAMES, SourceError

# Whole numbers below it are labels as they stand; others, like identifiers, are numbered in their order.
MAX_LABEL = 1 << 16
Value = int | str | None
Values = Sequence[Value] | np.ndarray


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
    values: Mapping[str, Values], names: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names, and by split the int32 label of every value (None and negative numbers: -1).

    Whole numbers are labels as they stand, and index names where these are given; text that spells whole numbers
    counts as numbers; other values are numbered in sorted order.

    Raises:
        SourceError: a number that names do not reach.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        texts = {split: [None if value is None else str(value) for value in group] for split, group in values.items()}
        known = sorted({text for group in texts.values() for text in group if text is not None})
        index: dict[str | None, int] = {text: number for number, text in enumerate(known)} | {None: -1}
        return tuple(known), {
            split: np.array([index[text] for text in group], np.int32) for split, group in texts.items()
        }
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


def _as_numbers(values: Mapping[str, Values]) -> dict[str, np.ndarray] | None:
    try:
        return {
            split: group.astype(np.int64)
            if isinstance(group, np.ndarray)
            else np.array([-1 if value is None else int(value) for value in group], np.int64)
            for split, group in values.items()
        }
    except (ValueError, OverflowError):
        return None
