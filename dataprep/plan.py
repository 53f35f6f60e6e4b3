"""The plan of a conversion: which images go to which shard, in what portions. It follows from source and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import EXTENSION

TASK_IMAGES, TASK_BYTES = 64, 1 << 23  # a worker's task ends at whichever comes first
RAW_PART = 8  # a task that gives pixels is so much smaller: about what they grow by
# Of how many images of a split the pixels are measured, evenly spaced: one in MEASURED_PART within these limits.
MEASURED_PART, MEASURED_AT_LEAST, MEASURED_AT_MOST = 32, 256, 10_000


class PlannedShard(NamedTuple):
    """One shard to write: file name, split, the samples in order, and of one in how many the pixels are measured."""

    name: str
    split: str
    samples: Sequence[Sample]
    measure_every: int


def plan_shards(splits: Mapping[str, Sequence[Sample]], shard_size: int, format: str) -> list[PlannedShard]:
    """Cut each split into shards `<split>-<5 digits>` of a format of the manifest.

    A part of a split is looked at only when its shard is written: where the order is computed, a shard's plan takes as
    little memory however many images there are.
    """
    return [
        PlannedShard(
            f"{split}-{start // shard_size:05d}{EXTENSION[format]}",
            split,
            samples[start : start + shard_size],
            _measure_every(len(samples)),
        )
        for split, samples in splits.items()
        for start in range(0, len(samples), shard_size)
    ]


def _measure_every(count: int) -> int:
    measured = min(max(count // MEASURED_PART, MEASURED_AT_LEAST), MEASURED_AT_MOST)
    return max(1, count // measured)


def by_split(plan: list[PlannedShard]) -> dict[str, list[str]]:
    """Return split name -> the names of its shards, in order."""
    return {
        split: [planned.name for planned in plan if planned.split == split]
        for split in dict.fromkeys(planned.split for planned in plan)
    }


def tasks(reader: Reader, shards: Sequence[PlannedShard], raw: bool) -> Iterator[list[tuple[Sample, bool]]]:
    """Cut the samples of shards, in order, into tasks of bounded count and bytes; none reaches into two shards.

    Each sample comes with whether to measure its pixels. raw: pixels are made of them.
    """
    part = RAW_PART if raw else 1
    for shard in shards:
        task: list[tuple[Sample, bool]] = []
        num_bytes = 0
        for i, sample in enumerate(shard.samples):
            task.append((sample, i % shard.measure_every == 0))
            num_bytes += reader.size(sample)
            if len(task) * part >= TASK_IMAGES or num_bytes * part >= TASK_BYTES:
                yield task
                task, num_bytes = [], 0
        if task:
            yield task
