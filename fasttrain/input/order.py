"""Which sample comes when: a pure function of (seed, epoch, step) over the global batch, computed for a step at a time.

Shuffled "global", every sample may come at any step. By "block", the samples lie in blocks (shards), which come in a
shuffled order, in as many lanes as are read at once; each lane goes through its part of them, one after the other, with
the samples of each shuffled, and gives an equal share of every batch. So storage reads whole blocks in sequence, and
ranks, whose shares lie one after the other, read different ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fasttrain.system.shuffle import round_keys, shuffled

_BLOCKS = 1  # of the keys of an epoch: the order of blocks is another than that of samples


class Block(NamedTuple):
    """A block's samples, from first to before end, and the step of the epoch that first needs one of them."""

    epoch: int
    step: int
    first: int
    end: int


class _Sequence(NamedTuple):
    """The blocks of an epoch one after the other: their numbers, and where each begins, and the last one ends."""

    number_K: np.ndarray
    start_K: np.ndarray


@dataclass(frozen=True, eq=False)
class Order:
    """The samples each step takes, and this rank's share of them.

    batch_size: over all ranks, a multiple of world_size. shuffle=False: in file order, the last batch may be smaller
    (evaluation); shuffle=True: a permutation of all samples per epoch, what is left over of the last batch is dropped.
    lanes: of shuffle "block", how many blocks are read at once; 0 for "global".
    block_S: where the blocks begin among the samples, and the last one ends, (blocks + 1,) int64; None: there are none.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    lanes: int = 0
    block_S: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(f"a batch of {self.batch_size} can't be shared equally by {self.world_size} processes")
        if self.lanes and self.block_S is None:
            raise ValueError("samples that lie in no blocks can't be shuffled by them")

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (1 if rest and not self.shuffle else 0)

    @property
    def own_lanes(self) -> range:
        """The lanes that this rank reads; one in file order, none for shuffle "global"."""
        if not self.shuffle:
            return range(1)
        share = self.batch_size // self.world_size
        end = ((self.rank + 1) * share - 1) * self.lanes // self.batch_size + 1
        return range(self.rank * share * self.lanes // self.batch_size, end) if self.lanes else range(0)

    def position(self, epoch: int, step: int) -> dict[str, int]:
        """The state of whoever goes on in this order at a step."""
        return {"epoch": epoch, "step": step, "lanes": self.lanes}

    def continued(self, state: dict[str, int]) -> Order:
        """The order of a position that was saved, which keeps its shuffle. Raises ValueError as the constructor."""
        return replace(self, lanes=state.get("lanes", self.lanes))

    def step(self, epoch: int, step: int) -> np.ndarray:
        """This rank's samples at a step of an epoch, int64."""
        first = step * self.batch_size
        size = min(self.batch_size, self.num_samples - first)
        share = -(-size // self.world_size)
        place_B = np.arange(min(self.rank * share, size), min((self.rank + 1) * share, size))
        if not self.shuffle:
            return first + place_B
        if self.lanes:
            return self._in_blocks(epoch, step, place_B)
        return shuffled(first + place_B, self.num_samples, round_keys(self.seed, epoch))

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """The sample that stands in for `index` when it can't be decoded; another one for every attempt ≥ 1."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, epoch, index, attempt]))
        if self.block_S is None or not self.lanes or attempt % 2 == 0:
            return int(generator.integers(self.num_samples))
        block = int(np.searchsorted(self.block_S, index, "right")) - 1  # it is being read, unless all of it is gone
        return int(generator.integers(*self.block_S[block : block + 2]))

    def blocks(self, epoch: int, step: int) -> Iterator[Block]:
        """The blocks that this rank reads from a step on, in the order in which it needs them, epoch after epoch.

        None for shuffle "global", which needs all of them at any time.
        """
        if self.block_S is None or (self.shuffle and not self.lanes):
            return
        while True:
            step_K, number_K = self._needed(epoch, step) if self.shuffle else self._needed_in_file_order(step)
            for at, number in zip(step_K.tolist(), number_K.tolist(), strict=True):
                yield Block(epoch, at, *map(int, self.block_S[number : number + 2]))
            epoch, step = epoch + 1, 0

    # Blocks: position p of a batch belongs to the lane p·lanes/batch_size; a lane's samples of all steps lie one after
    # the other in the sequence of blocks.

    @functools.cached_property
    def _sequence(self) -> Callable[[int], _Sequence]:
        return functools.lru_cache(2)(self._new_sequence)  # of this epoch, and of the next, which is looked ahead to

    def _new_sequence(self, epoch: int) -> _Sequence:
        assert self.block_S is not None
        size_K = np.diff(self.block_S)
        number_K = shuffled(np.arange(len(size_K)), len(size_K), round_keys(self.seed, epoch, _BLOCKS))
        return _Sequence(number_K, np.cumsum([0, *size_K[number_K]]))

    def _in_blocks(self, epoch: int, step: int, place_B: np.ndarray) -> np.ndarray:
        assert self.block_S is not None
        number_K, start_K = self._sequence(epoch)
        lane_B = place_B * self.lanes // self.batch_size
        first_B, end_B = self._first_of_lane(lane_B), self._first_of_lane(lane_B + 1)
        in_sequence_B = self.steps_per_epoch * first_B + step * (end_B - first_B) + place_B - first_B
        block_B = np.searchsorted(start_K, in_sequence_B, "right") - 1
        number_B = number_K[block_B]
        size_B = start_K[block_B + 1] - start_K[block_B]
        row_B = shuffled(in_sequence_B - start_K[block_B], size_B, round_keys(self.seed, epoch), number_B)
        return self.block_S[number_B] + row_B

    def _first_of_lane(self, lane: np.ndarray) -> np.ndarray:
        return -(-lane * self.batch_size // self.lanes)

    def _needed(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of this rank's lanes, and the steps that first need them, in the order of these."""
        number_K, start_K = self._sequence(epoch)
        step_L, block_L = [], []
        for lane in self.own_lanes:
            first, last = self._first_of_lane(np.array([lane, lane + 1])).tolist()
            if first == last:  # more lanes than samples in a batch
                continue
            begin, stop = self.steps_per_epoch * first + step * (last - first), self.steps_per_epoch * last
            block_K = np.arange(*np.searchsorted(start_K, [begin, stop - 1], "right") + np.array([-1, 0]))
            step_L.append(np.maximum(step, (start_K[block_K] - self.steps_per_epoch * first) // (last - first)))
            block_L.append(block_K)
        step_K, block_K = np.concatenate(step_L), np.concatenate(block_L)
        by_step = np.argsort(step_K, kind="stable")
        return step_K[by_step], number_K[block_K[by_step]]

    def _needed_in_file_order(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.block_S is not None
        number_K = np.flatnonzero(self.block_S[1:] > step * self.batch_size)
        return np.maximum(step, self.block_S[number_K] // self.batch_size), number_K
