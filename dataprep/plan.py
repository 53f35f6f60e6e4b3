"""The plan of a conversion: which images go to which shard, in what portions. It follows from source and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dataprep.listing import Listing, Reader, Sample
from dataprep.manifest import EXTENSION

TASK_IMAGES, TASK_BYTES = 64, 1 << 23  # a worker's task ends at whichever comes first
# Every image of a shard with fewer samples is measured for the pixel statistics, of others every 8th.
MEASURE_ALL, MEASURE_EVERY = 512, 8


class PlannedShard(NamedTuple):
    """One shard to write: file name, split, and the samples in order."""

    name: str
    split: str
    samples: Sequence[Sample]


def plan_shards(splits: dict[str, Listing], shard_size: int, format: str) -> list[PlannedShard]:
    """Cut each split into shards `<split>-<5 digits>` of a format of the manifest."""
    return [
        PlannedShard(
            f"{split}-{start // shard_size:05d}{EXTENSION[format]}", split, samples[start : start + shard_size]
        )
        for split, samples in splits.items()
        for start in range(0, len(samples), shard_size)
    ]


def by_split(plan: list[PlannedShard]) -> dict[str, list[str]]:
    """Return split name -> the names of its shards, in order."""
    return {
        split: [planned.name for planned in plan if planned.split == split]
        for split in dict.fromkeys(planned.split for planned in plan)
    }


def tasks(reader: Reader, shards: Sequence[PlannedShard]) -> Iterator[list[tuple[Sample, bool]]]:
    """Cut the samples of shards, in order, into tasks of bounded count and bytes; none reaches into two shards.

    Each sample comes with whether to measure its pixels.
    """
    for shard in shards:
        every = 1 if len(shard.samples) < MEASURE_ALL else MEASURE_EVERY
        task: list[tuple[Sample, bool]] = []
        num_bytes = 0
        for i, sample in enumerate(shard.samples):
            task.append((sample, i % every == 0))
            num_bytes += reader.size(sample)
            if len(task) == TASK_IMAGES or num_bytes >= TASK_BYTES:
                yield task
                task, num_bytes = [], 0
        if task:
            yield task
