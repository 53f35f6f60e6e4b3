"""One finished shard: its file, written image by image, and the record beside it by which a conversion continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dataprep.beton import BetonWriter
from dataprep.images import EncodedImage, PixelSums
from dataprep.manifest import Shard, write_json
from dataprep.plan import PlannedShard
from dataprep.progress import Note


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as recorded beside it until the manifest is written; one without samples has no file."""

    shard: Shard
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: list[int]


def write_shard(
    folder: Path, planned: PlannedShard, images: Iterator[EncodedImage | str], num_classes: int, note: Note
) -> ShardRecord:
    """Write one shard from the next images of an iterator, and its record after it.

    Args:
        folder: where both go.
        planned: the shard's name and samples.
        images: in the order of the samples; a string is the reason why one is skipped.
        num_classes: labels are below it.
        note: told of every image.

    Raises:
        OSError: the disk is full, or failed; the shard's name is not taken then.
    """
    sums, skipped = np.zeros(7, np.int64), []
    class_counts = [0] * num_classes
    with BetonWriter(folder / planned.name, len(planned.samples)) as writer:
        # The samples come first in zip: when they end, no image of the next shard has been taken.
        for sample, image in zip(planned.samples, images, strict=False):
            if isinstance(image, str):
                skipped.append({"path": sample.path, "reason": image})
            else:
                writer.write(image.jpeg, image.height, image.width, sample.label)
                sums += (image.pixels.num_pixels, *image.pixels.total_3, *image.pixels.square_3)
                if sample.label >= 0:
                    class_counts[sample.label] += 1
            note(sample.path, image if isinstance(image, str) else None)
    pixels = PixelSums(int(sums[0]), tuple(sums[1:4].tolist()), tuple(sums[4:].tolist()))
    record = ShardRecord(_describe(folder / planned.name, writer.num_samples), pixels, skipped, class_counts)
    write_json(record_path(folder, planned.name), asdict(record))
    return record


def _describe(path: Path, num_samples: int) -> Shard:
    if not num_samples:
        return Shard(path.name, 0, 0, "")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Shard(path.name, num_samples, path.stat().st_size, digest.hexdigest())


def read_record(folder: Path, name: str) -> ShardRecord | None:
    """Return the record of a finished shard, None if the shard has to be written."""
    try:
        content = json.loads(record_path(folder, name).read_bytes())
    except FileNotFoundError:
        return None
    shard = Shard(**content["shard"])
    if shard.num_samples and (not (folder / name).exists() or (folder / name).stat().st_size != shard.num_bytes):
        return None
    count, total, square = content["pixels"]
    pixels = PixelSums(count, tuple(total), tuple(square))
    return ShardRecord(shard, pixels, content["skipped"], content["class_counts"])


def record_path(folder: Path, name: str) -> Path:
    """Return where the record of a shard lies."""
    return folder / f"{name}.json"
