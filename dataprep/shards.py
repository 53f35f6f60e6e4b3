"""One finished shard: its file, written image by image, and the record beside it by which a conversion continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.dataprep.encode import EncodedImage, PixelSums
from fasttrain.dataprep.plan import PlannedShard
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.manifest import Shard, SideFile, glimpses
from fasttrain.formats.tar import TarShardWriter, index_path
from fasttrain.system.durable import write_json


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as recorded beside it until the manifest is written; one without samples has no file."""

    shard: Shard
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: list[int]


class Written(NamedTuple):
    """What is known of a shard once its images are written, except for its checksum."""

    path: Path
    num_samples: int
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: list[int]


def write_images(
    folder: Path,
    planned: PlannedShard,
    images: Iterator[EncodedImage | str],
    num_classes: int,
    note: Callable[[str, str | None], None],
) -> Written:
    """Write one shard from the next images of an iterator.

    Args:
        folder: where it goes.
        planned: the shard's name, which says the format, and samples.
        images: in the order of the samples; a string is the reason why one is skipped.
        num_classes: labels are below it.
        note: told of every image, its path and why it is skipped.

    Raises:
        OSError: the disk is full, or failed; the shard's name is not taken then.
    """
    sums, skipped = np.zeros(7, np.int64), []
    class_counts = [0] * num_classes
    path = folder / planned.name
    with TarShardWriter(path) if path.suffix == ".tar" else BetonWriter(path, len(planned.samples)) as writer:
        # The samples come first in zip: when they end, no image of the next shard has been taken.
        for sample, image in zip(planned.samples, images, strict=False):
            if isinstance(image, str):
                skipped.append({"path": sample.path, "reason": image})
            else:
                writer.write(image.stream, image.height, image.width, sample.label, image.raw)
                if image.pixels is not None:
                    sums += (image.pixels.num_pixels, *image.pixels.total_3, *image.pixels.square_3)
                if sample.label >= 0:
                    class_counts[sample.label] += 1
            note(sample.path, image if isinstance(image, str) else None)
    pixels = PixelSums(int(sums[0]), tuple(sums[1:4].tolist()), tuple(sums[4:].tolist()))
    return Written(path, writer.num_samples, pixels, skipped, class_counts)


def record_shard(written: Written) -> ShardRecord:
    """Compute the checksums of a written shard and put its record beside it; OSError if the disk fails."""
    path = written.path
    if written.num_samples:
        index = SideFile(*_described(index_path(path))) if path.suffix == ".tar" else None
        name, num_bytes, sha256 = _described(path)
        shard = Shard(name, written.num_samples, num_bytes, sha256, index, glimpses(path))
    else:
        shard = Shard(path.name, 0, 0, "")
    record = ShardRecord(shard, written.pixels, written.skipped, written.class_counts)
    write_json(record_path(path.parent, path.name), asdict(record))
    return record


def _described(path: Path) -> tuple[str, int, str]:
    return path.name, path.stat().st_size, checksum(path)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_record(folder: Path, name: str) -> ShardRecord | None:
    """Return the record of a finished shard, None if the shard has to be written."""
    try:
        content = json.loads(record_path(folder, name).read_bytes())
    except FileNotFoundError:
        return None
    shard = Shard.of(content["shard"])
    if shard.num_samples and not all(_has_size(folder / file.name, file.num_bytes) for file in shard.files()):
        return None
    count, total, square = content["pixels"]
    pixels = PixelSums(count, tuple(total), tuple(square))
    return ShardRecord(shard, pixels, content["skipped"], content["class_counts"])


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.exists() and path.stat().st_size == num_bytes


def record_path(folder: Path, name: str) -> Path:
    """Return where the record of a shard lies."""
    return folder / f"{name}.json"
