"""The order in which a conversion writes samples: any part of it is computed, so that none of it is kept in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

import numpy as np

from fasttrain.dataprep.sources.parquet import CACHE_BYTES
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.listing import Listing, Sample
from fasttrain.formats.splits import set_apart
from fasttrain.system.errors import UserError
from fasttrain.system.shuffle import round_keys, shuffled

Shuffle = Literal["auto", "global", "block"]
# Of shuffle "block": how many files are read at once, and from how many bytes on "auto" takes it. No machine's memory
# decides: a conversion may go on on another one.
LANES, BLOCK_BYTES = 64, 1 << 38
ORDER_VERSION = 2  # of an unfinished conversion; 1 was that of numbers that were sorted
_AT_ONCE = 1 << 11
_OF_GROUPS = 1  # counter of the keys that shuffle groups, not samples


class Chosen:
    """Rows of a listing, in their order: all, those of a sorted list, or all but those."""

    def __init__(self, num_rows: int, row_V: np.ndarray | None = None, without: bool = True) -> None:
        self._row_V = np.zeros(0, np.int64) if row_V is None else row_V
        self._without = without
        # Of all but those: how many rows are left before each.
        self._gap_V = self._row_V - np.arange(len(self._row_V)) if without else self._row_V
        self._count = num_rows - len(self._row_V) if without else len(self._row_V)

    def __len__(self) -> int:
        return self._count

    def rows(self, index_N: np.ndarray) -> np.ndarray:
        """Return the rows that are chosen at these places."""
        return index_N + np.searchsorted(self._gap_V, index_N, "right") if self._without else self._row_V[index_N]

    def before(self, row_K: np.ndarray) -> np.ndarray:
        """Return how many are chosen of those before each of these rows."""
        listed_K = np.searchsorted(self._row_V, row_K)
        return row_K - listed_K if self._without else listed_K


class _Sequence:
    """Groups one after the other, in a shuffled order; start_G: where each begins, and the last one ends."""

    def __init__(self, start_G: np.ndarray, seed: int) -> None:
        self._start_G = start_G
        self.number_G = shuffled(np.arange(len(start_G) - 1), len(start_G) - 1, round_keys(seed, _OF_GROUPS))
        self.starts = np.cumsum([0, *np.diff(start_G)[self.number_G]])

    def __call__(self, position_N: np.ndarray) -> np.ndarray:
        group_N = np.searchsorted(self.starts, position_N, "right") - 1
        return self._start_G[self.number_G[group_N]] + position_N - self.starts[group_N]


Order = Callable[[np.ndarray], np.ndarray]  # places in the order that is written -> places among what is chosen


def everywhere(count: int, seed: int) -> Order:
    """Shuffle over all."""
    keys_R = round_keys(seed)
    return lambda place_N: shuffled(place_N, count, keys_R)


def in_windows(start_G: np.ndarray, bytes_G: np.ndarray, seed: int) -> Order:
    """Shuffle within windows of shuffled groups that fit a process's cache."""
    sequence, keys_R = _Sequence(start_G, seed), round_keys(seed)
    window_G = np.cumsum(bytes_G[sequence.number_G]) // (CACHE_BYTES // 2)
    start_W = sequence.starts[np.append(np.unique(window_G, return_index=True)[1], len(window_G))]

    def order(place_N: np.ndarray) -> np.ndarray:
        window_N = np.searchsorted(start_W, place_N, "right") - 1
        start_N, end_N = start_W[window_N], start_W[window_N + 1]
        return sequence(start_N + shuffled(place_N - start_N, end_N - start_N, keys_R, window_N))

    return order


def in_lanes(start_G: np.ndarray, seed: int) -> Order:
    """Read shuffled files in LANES equal lanes, each from front to back, and take from the lanes in turn."""
    sequence, count = _Sequence(start_G, seed), int(start_G[-1])
    share, rest = divmod(count, LANES)

    def order(place_N: np.ndarray) -> np.ndarray:
        turn_N, lane_N = np.divmod(place_N, LANES)
        return sequence(lane_N * share + np.minimum(lane_N, rest) + turn_N)

    return order


class Ordered(Sequence[Sample]):
    """Samples of a listing in an order that is computed."""

    def __init__(self, listing: Listing, chosen: Chosen, order: Order, first: int, end: int) -> None:
        self._listing, self._chosen, self._order = listing, chosen, order
        self._first, self._end = first, end

    def __len__(self) -> int:
        return self._end - self._first

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Ordered: ...

    def __getitem__(self, index: int | slice) -> Sample | Ordered:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a part has no gaps")
            return Ordered(
                self._listing, self._chosen, self._order, self._first + start, self._first + max(start, stop)
            )
        return next(iter(self[range(len(self))[index] :]))

    def __iter__(self) -> Iterator[Sample]:
        for first in range(self._first, self._end, _AT_ONCE):
            place_N = np.arange(first, min(first + _AT_ONCE, self._end))
            yield from self._listing.take(self._chosen.rows(self._order(place_N)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Listing], tuple[list[Sample]]]:
        return Listing, (list(self),)  # to a worker of Ray go the samples of its shard


def chosen_shuffle(source: Source, shuffle: Shuffle) -> Literal["global", "block"]:
    """Return how the images of a source are shuffled; "auto" follows from the source alone.

    Samples that are read in groups are always shuffled in their own way, which counts as "global". Raises UserError for
    what the source does not allow.
    """
    if source.groups:
        if shuffle != "auto":
            raise UserError(f"--shuffle {shuffle}: rows of tables are always shuffled among neighbouring row groups")
        return "global"
    if shuffle == "global":
        return "global"
    if shuffle == "block":
        if not source.in_sequence:
            raise UserError("--shuffle block is for .tar and .beton files, which can be read from front to back")
        return "block"
    if not source.in_sequence or len(source.files) < LANES:
        return "global"
    num_bytes = sum(os.stat(file).st_size for file in source.files)
    return "block" if num_bytes > BLOCK_BYTES else "global"


def shuffled_splits(source: Source, val_fraction: float, seed: int, block: bool = False) -> dict[str, Ordered]:
    """Shuffle each split; with val_fraction, set apart that part of every class as "val" (rounded to whole images).

    Samples that are read in groups are shuffled within windows of shuffled groups that fit a process's cache.
    block: files are read in sequence, LANES at a time.
    Raises SourceError if the source has a val split already, or the fraction leaves a split without images.
    """
    chosen = {split: (split, Chosen(len(listing))) for split, listing in source.splits.items()}
    if val_fraction:
        row_V = set_apart(source.splits, val_fraction, seed, source.root)
        count = len(source.splits["train"])
        chosen = {"train": ("train", Chosen(count, row_V)), "val": ("train", Chosen(count, row_V, without=False))}
    return {split: _ordered(source, of, rows, seed, block) for split, (of, rows) in chosen.items()}


def _ordered(source: Source, split: str, chosen: Chosen, seed: int, block: bool) -> Ordered:
    listing, order = source.splits[split], everywhere(len(chosen), seed)
    if split in source.groups:
        groups = source.groups[split]
        order = in_windows(chosen.before(groups.start_G), groups.bytes_G, seed)
    elif block:
        start_K, is_sorted = _files_of(listing)
        if not is_sorted:
            listing = listing.take(chosen.rows(np.arange(len(chosen))))
            listing = listing.take(np.lexsort(listing.place_NK[:, 1::-1].T))
            chosen, (start_K, _) = Chosen(len(listing)), _files_of(listing)
        order = in_lanes(chosen.before(start_K), seed)
    return Ordered(listing, chosen, order, 0, len(chosen))


def _files_of(listing: Listing) -> tuple[np.ndarray, bool]:
    """Return where the samples of each file begin, and the last ones end, and whether they are listed as they lie."""
    starts, at, last_K, is_sorted = list[np.ndarray](), 0, np.array([[-1, 0]]), True
    for place_NK in listing.places():
        file_N, offset_N = np.concatenate([last_K, place_NK[:, :2]]).T
        other_N = np.diff(file_N)
        starts.append(at + np.flatnonzero(other_N))
        is_sorted &= bool(np.all((other_N > 0) | ((other_N == 0) & (np.diff(offset_N) >= 0))))
        at, last_K = at + len(place_NK), place_NK[-1:, :2]
    return np.concatenate([*starts, [at]]), is_sorted
