"""One finished shard: its file, written image by image, and the record beside it by which a conversion continues."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.dataprep.destination import Destination
from fasttrain.dataprep.encode import EncodedImage, PixelSums
from fasttrain.dataprep.plan import PlannedShard
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.checked import Malformed, any_value, count, fields, list_of, table_of, text
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import SHARD, Shard, SideFile, glimpses
from fasttrain.formats.names import NamesWriter, names_path
from fasttrain.formats.tar import TarShardWriter, index_path
from fasttrain.formats.writer import ShardWriter
from fasttrain.system.durable import write_json
from fasttrain.system.ordered import map_in_order
from fasttrain.system.regular import open_regular


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as recorded beside it until the manifest is written; one without samples has no file.

    class_counts: label -> samples, of the labels that occur.
    """

    shard: Shard
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: dict[int, int]


class Written(NamedTuple):
    """A shard once its images are written: what is known of it, except for its checksum, and its names to publish."""

    path: Path
    num_samples: int
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: dict[int, int]
    names: NamesWriter


def write_images(
    folder: Path,
    planned: PlannedShard,
    images: Iterator[EncodedImage | str],
    note: Callable[[str, str | None], None],
    settle: Callable[[Sequence[Sample]], None],
) -> Written:
    """Write one shard from the next images of an iterator.

    Args:
        folder: where it goes.
        planned: the shard's name, which says the format, and samples.
        images: in the order of the samples; a string is the reason why one is skipped.
        note: told of every image, its path and why it is skipped.
        settle: called with the samples before the shard gets its name; raises where too many could not be read.

    Raises:
        OSError: the disk is full, or failed; the shard's name is not taken then.
    """
    sums, skipped = np.zeros(7, np.int64), []
    class_counts = Counter[int]()
    path = folder / planned.name
    names = NamesWriter(path)
    try:
        with _shard_writer(path, len(planned.samples)) as writer:
            # The samples come first in zip: when they end, no image of the next shard has been taken.
            for sample, image in zip(planned.samples, images, strict=False):
                if isinstance(image, str):
                    skipped.append({"path": sample.path, "reason": image})
                else:
                    writer.write(image.stream, image.height, image.width, sample.label, image.raw)
                    names.write(sample.path)
                    if image.pixels is not None:
                        sums += (image.pixels.num_pixels, *image.pixels.total_3, *image.pixels.square_3)
                    if sample.label >= 0:
                        class_counts[sample.label] += 1
                note(sample.path, image if isinstance(image, str) else None)
            settle(planned.samples)
    except BaseException:
        names.discard()
        raise
    pixels = PixelSums(int(sums[0]), tuple(sums[1:4].tolist()), tuple(sums[4:].tolist()))
    return Written(path, writer.num_samples, pixels, skipped, dict(class_counts), names)


def _shard_writer(path: Path, max_samples: int) -> ShardWriter:
    return TarShardWriter(path) if path.suffix == ".tar" else BetonWriter(path, max_samples)


def record_shard(written: Written, out: Destination, moved: Callable[[], None] = lambda: None) -> ShardRecord:
    """Give a written shard its names and its checksums, publish it, and then its record beside it.

    moved: called while bytes are on their way. Raises OSError if the disk fails, and what `out` does.
    """
    path = written.path
    if written.num_samples:
        written.names.publish()
        index = described(index_path(path)) if path.suffix == ".tar" else None
        file = described(path)
        names = described(names_path(path))
        shard = Shard(file.name, written.num_samples, file.num_bytes, file.sha256, index, glimpses(path), names)
    else:
        written.names.discard()
        shard = Shard(path.name, 0, 0, "")
    record = ShardRecord(shard, written.pixels, written.skipped, written.class_counts)
    if written.num_samples:
        out.publish([path.with_name(file.name) for file in shard.files()], moved)
    beside = path.with_name(record_name(path.name))
    write_json(beside, asdict(record))
    out.publish([beside])
    return record


def described(path: Path) -> SideFile:
    """Return name, size and checksum of a file. Raises OSError."""
    return SideFile(path.name, path.stat().st_size, checksum(path))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_records(out: Destination, plan: Sequence[PlannedShard], num_classes: int) -> Iterator[ShardRecord]:
    """Yield the records of the shards that are finished, in order: only what a listing shows is looked at."""
    names = set(out.names())
    there = [planned for planned in plan if record_name(planned.name) in names]
    read = functools.partial(read_record, out, num_classes=num_classes)
    found = map_in_order(read, there, out.requests) if out.requests > 1 else map(read, there)
    yield from filter(None, found)


def read_record(out: Destination, planned: PlannedShard, num_classes: int) -> ShardRecord | None:
    """Return the record of a finished shard, None if the shard has to be written; a line tells of a damaged one."""
    name = record_name(planned.name)
    try:
        content = out.read_json(name)
        _RECORD(content, "record")
        num_pixels, total, square = content["pixels"]
        pixels = PixelSums(num_pixels, tuple(total), tuple(square))
        counts = {int(label): number for label, number in content["class_counts"].items()}
        record = ShardRecord(Shard.of(content["shard"]), pixels, content["skipped"], counts)
        _check_fit(out, planned, num_classes, record)
        return record
    except FileNotFoundError as error:
        if str(error.filename).endswith(name):  # since it was listed
            return None
        reason = f"{error.filename} is missing"
    except (OSError, ValueError) as error:
        reason = str(error)
    print(f"{out}/{name}: {reason}: the shard is made again", file=sys.stderr, flush=True)
    return None


def _check_fit(out: Destination, planned: PlannedShard, num_classes: int, record: ShardRecord) -> None:
    """Raise Malformed where a record is not of this shard, OSError where a file of it can't be read."""
    shard, path = record.shard, Path(planned.name)
    names = [planned.name, *([index_path(path).name] if path.suffix == ".tar" else []), names_path(path).name]
    if shard.num_samples + len(record.skipped) != len(planned.samples):
        raise Malformed("not of these images")
    if not all(0 <= label < num_classes for label in record.class_counts):
        raise Malformed("not of these classes")
    if [file.name for file in shard.files()] != (names if shard.num_samples else names[:1]):
        raise Malformed("not of these files")
    if not shard.num_samples:
        return
    for file in shard.files():
        if out.num_bytes(file.name) != file.num_bytes:
            raise Malformed(f"{file.name} is another file")
    if (seen := out.glimpses(shard.name)) and seen != shard.glimpses:
        raise Malformed(f"{shard.name} is another file")


def _pixels(value: object, where: str) -> None:
    list_of(any_value, 3)(value, where)
    assert isinstance(value, list)
    count(value[0], where)
    list_of(list_of(count, 3))(value[1:], where)


_RECORD = fields(
    {
        "shard": SHARD,
        "pixels": _pixels,
        "skipped": list_of(fields({"path": text, "reason": text})),
        "class_counts": table_of(count),
    }
)


def record_name(name: str) -> str:
    """Return what the record of a shard is called."""
    return f"{name}.json"
