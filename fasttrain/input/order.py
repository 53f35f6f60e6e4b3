"""Which sample comes when: a pure function of (seed, epoch, step) over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The samples each step takes, and this rank's share of them.

    batch_size: over all ranks, a multiple of world_size. shuffle=False: in file order, the last batch may be smaller
    (evaluation); shuffle=True: a permutation of all samples per epoch, what is left over of the last batch is dropped.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(f"a batch of {self.batch_size} can't be shared equally by {self.world_size} processes")

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (1 if rest and not self.shuffle else 0)

    def epoch(self, epoch: int) -> np.ndarray:
        """All samples of an epoch in order, (num_samples,) int64, the same on every rank."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, epoch, 0, 0]))
        return generator.permutation(self.num_samples)

    def step(self, epoch_order: np.ndarray, step: int) -> np.ndarray:
        """This rank's samples at a step of the epoch that epoch(n) gave."""
        batch = epoch_order[step * self.batch_size : (step + 1) * self.batch_size]
        share = -(-len(batch) // self.world_size)
        return batch[self.rank * share : (self.rank + 1) * share]

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """The sample that stands in for `index` when it can't be decoded; another one for every attempt ≥ 1."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, epoch, index, attempt]))
        return int(generator.integers(self.num_samples))
