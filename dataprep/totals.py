"""What the records of finished shards come to: a manifest. Of each its entry is kept, and what it skips."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.dataprep.plan import PlannedShard, by_split
from fasttrain.dataprep.shards import ShardRecord, described
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.manifest import SKIPPED_FILE, Manifest, Shard, Skips
from fasttrain.formats.names import escaped
from fasttrain.system.durable import replace_file

LISTED_SKIPS = 10_000  # are in the manifest; of more all are in a file beside it


class Totals:
    """The shards that are finished.

    Attributes:
        shards: name -> entry of the manifest, without samples where none of its images could be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shards: dict[str, Shard] = {}
        self._skipped: dict[str, list[tuple[str, str]]] = {}  # by shard: path and reason
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(7, np.int64))
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(source.classes), np.int64))

    def add(self, record: ShardRecord) -> None:
        """Take the record of a shard; nothing of it is kept but its entry and its skipped images."""
        name = record.shard.name
        split = name.rpartition("-")[0]
        self.shards[name] = record.shard
        self._sums[split] += (record.pixels[0], *record.pixels[1], *record.pixels[2])
        for label, number in record.class_counts.items():
            self._counts[split][label] += number
        if record.skipped:
            self._skipped[name] = [(skip["path"], sys.intern(skip["reason"])) for skip in record.skipped]

    def skips(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield path and reason of all that is skipped, of the source itself first, then of these shards."""
        yield from ((skip["path"], skip["reason"]) for skip in self._source.skipped)
        for name in names:
            yield from self._skipped.get(name, ())

    def first_skip(self, names: Sequence[str]) -> tuple[str, str]:
        """Return path and reason of the first image that is skipped in these shards, one of which has some."""
        return next(skip for name in names for skip in self._skipped.get(name, ()))

    def manifest(
        self, plan: list[PlannedShard], settings: dict[str, Any], versions: dict[str, str], folder: Path | None
    ) -> Manifest:
        """Return the manifest of these shards; the pixel statistics are those of the training split.

        folder: where a file of all that is skipped goes, if that is much; None writes none.
        """
        names = [planned.name for planned in plan]
        skips = [skip for skip, _ in zip(self.skips(names), range(LISTED_SKIPS), strict=False)]
        splits = by_split(plan)
        mean, std = self._pixel_statistics()
        return Manifest(
            format=settings["format"],
            classes=list(self._source.classes),
            splits={split: [self.shards[n] for n in of if self.shards[n].num_samples] for split, of in splits.items()},
            pixel_mean=mean,
            pixel_std=std,
            settings={name: value for name, value in settings.items() if value is not None},
            skipped=[{"path": path, "reason": reason} for path, reason in skips],
            class_counts={split: self._counts[split].tolist() for split in splits},
            versions=versions,
            unused=self._source.unused.content(),
            notes=self._source.notes,
            skips=self._all_skips(names, folder),
        )

    def _pixel_statistics(self) -> tuple[list[float], list[float]]:
        sums = self._sums["train"].astype(np.float64)
        if not sums[0]:  # all that were to be measured are unreadable: as for evenly spread values
            sums[:] = (1, *[127.5] * 3, *[255**2 / 3] * 3)
        mean = sums[1:4] / sums[0] / 255
        std = np.sqrt(np.maximum(sums[4:] / sums[0] / 255**2 - mean**2, 0))
        return mean.round(6).tolist(), std.round(6).tolist()

    def _all_skips(self, names: Sequence[str], folder: Path | None) -> Skips | None:
        reasons = Counter(reason for _, reason in self.skips(names))
        if reasons.total() <= LISTED_SKIPS:
            return None
        file = None
        if folder:
            lines = (f"{escaped(path)}\t{escaped(reason)}\n".encode() for path, reason in self.skips(names))
            replace_file(folder / SKIPPED_FILE, lambda new: new.writelines(lines))
            file = described(folder / SKIPPED_FILE)
        return Skips(reasons.total(), dict(sorted(reasons.items())), file)
