"""The plan of a conversion: which images go to which shard, in what portions. It follows from source and settings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataprep.sources import Sample

TASK_IMAGES, TASK_BYTES = 64, 1 << 23  # a worker's task ends at whichever comes first


class PlannedShard(NamedTuple):
    """One shard to write: file name, split, and the samples in order."""

    name: str
    split: str
    samples: Sequence[Sample]


def plan_shards(splits: dict[str, list[Sample]], shard_size: int) -> list[PlannedShard]:
    """Cut each split into shards `<split>-<5 digits>.beton`."""
    return [
        PlannedShard(f"{split}-{start // shard_size:05d}.beton", split, samples[start : start + shard_size])
        for split, samples in splits.items()
        for start in range(0, len(samples), shard_size)
    ]


def by_split(plan: list[PlannedShard]) -> dict[str, list[str]]:
    """Return split name -> the names of its shards, in order."""
    return {
        split: [planned.name for planned in plan if planned.split == split]
        for split in dict.fromkeys(planned.split for planned in plan)
    }


def tasks(root: Path, shards: Sequence[PlannedShard]) -> Iterator[list[str]]:
    """Cut the samples of shards, in order, into tasks of bounded count and bytes; none reaches into two shards."""
    for shard in shards:
        task: list[str] = []
        num_bytes = 0
        for sample in shard.samples:
            task.append(sample.path)
            with contextlib.suppress(OSError):  # a missing file is reported by the worker
                num_bytes += os.stat(os.path.join(root, sample.path)).st_size
            if len(task) == TASK_IMAGES or num_bytes >= TASK_BYTES:
                yield task
                task, num_bytes = [], 0
        if task:
            yield task
