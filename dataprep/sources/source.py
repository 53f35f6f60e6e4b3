"""What a source is: its samples, and how a worker reads one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fasttrain.formats.listing import Listing, Sample, Unused

MAX_UNPACKED_BYTES = 1 << 31  # of an array that has to be unpacked whole


class Reader(Protocol):
    """Reads the samples of one source, in several threads at once; sent to Ray's workers, so it holds no open file."""

    def read(self, sample: Sample) -> bytes | np.ndarray:
        """Return the bytes of an image file, or pixels (H, W, 3) uint8; OSError or DataError if it can't be read."""

    def size(self, sample: Sample) -> int:
        """Return about how many bytes that is, by which work is divided."""


class Groups(NamedTuple):
    """Samples that can only be read together.

    start_G: where each group begins among the samples, and the last one ends, (groups + 1,) int64.
    bytes_G: what reading a group costs in bytes, int64.
    """

    start_G: np.ndarray
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
        in_sequence: whether a place begins with the number of a file and an offset in it.
        unused: what is no image, or was not asked for.
        notes: sentences for the person who converts it, on how it was read.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    reader: Reader
    files: tuple[str, ...] = ()
    skipped: list[dict[str, str]] = field(default_factory=list)
    groups: dict[str, Groups] = field(default_factory=dict)
    in_sequence: bool = False
    unused: Unused = field(default_factory=Unused)
    notes: list[str] = field(default_factory=list)
