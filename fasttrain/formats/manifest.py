"""`manifest.json`: what a converted data set holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.formats.checked import (
    Malformed,
    any_value,
    count,
    fields,
    list_of,
    none_or,
    number,
    plain_name,
    table_of,
    text,
)
from fasttrain.system.durable import read_json, write_json
from fasttrain.system.errors import DataError
from fasttrain.system.regular import open_regular

FILE_NAME = "manifest.json"
SKIPPED_FILE = "skipped.txt"
STATE_FILE = "conversion.json"  # lies there until the manifest does
# How shards are stored, and how their names end.
EXTENSION = {"ffcv": ".beton", "webdataset": ".tar"}
FORMATS = tuple(EXTENSION)
_VERSION, _READ_VERSIONS = 2, (1, 2)
_GLIMPSES, _GLIMPSE_BYTES = 3, 1024  # a part holds some bytes of an image, even in a .tar of small ones


class ManifestError(DataError):
    """The folder is no complete, readable data set; the text is one line."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside a shard: name in the folder, size in bytes, SHA-256 in hex."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a data set: name in the folder, samples in it, size in bytes, SHA-256 in hex.

    index: DALI's, of a .tar.
    glimpses: see the function; empty for a shard without samples, and in sets that were made without them.
    names: what the source called the samples; None in sets that were made without.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index: SideFile | None = None
    glimpses: tuple[str, ...] = ()
    names: SideFile | None = None

    @classmethod
    def of(cls, content: dict[str, Any]) -> Shard:
        """Make a shard of its JSON object, as SHARD checks it."""
        beside = {key: SideFile(**content[key]) for key in ("index", "names") if content.get(key)}
        return cls(**{**content, **beside, "glimpses": tuple(content.get("glimpses", ()))})

    def files(self) -> list[Shard | SideFile]:
        """Return the shard and what lies beside it: everything it consists of."""
        return [self, *(file for file in (self.index, self.names) if file)]


@dataclass(frozen=True)
class Skips:
    """Of images that could not be converted: how many, in all and by reason, and the file that names each.

    A line is a path, a tab and the reason, both as the lines of names are (fasttrain.formats.names).
    """

    count: int
    reasons: dict[str, int]
    file: SideFile | None = None


@dataclass(frozen=True)
class Manifest:
    """A converted data set. It holds no times, so that the same conversion gives the same bytes.

    Attributes:
        format: how the shards are stored, one of FORMATS.
        classes: class names; a sample's label is an index into them (empty: no labels).
        splits: split name ("train", "val") -> its shards, in order; their names are plain names in the folder.
        pixel_mean: mean of the training pixels per channel R, G, B, of values scaled to 0..1.
        pixel_std: standard deviation of the same.
        settings: what the shards are a function of: the conversion's options and the source's fingerprint.
        skipped: images that could not be converted, as {"path": ..., "reason": ...}; of very many the first.
        class_counts: split name -> samples per class (empty: no labels).
        versions: the tools that made the shards, name -> version.
        unused: what is no image, or was not asked for, as {"reason": ..., "count": ..., "first": [names]}.
        notes: sentences on how the source was read.
        skips: all that were skipped, where `skipped` has only the first.
    """

    format: str
    classes: list[str]
    splits: dict[str, list[Shard]]
    pixel_mean: list[float]
    pixel_std: list[float]
    settings: dict[str, Any]
    skipped: list[dict[str, str]]
    class_counts: dict[str, list[int]]
    versions: dict[str, str]
    unused: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skips: Skips | None = None

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of the checksums of a split's shards: it changes when any sample's content or number does."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.splits[split]).encode()).hexdigest()

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split; KeyError if there is no such split."""
        return sum(shard.num_samples for shard in self.splits[split])

    def files(self) -> list[Shard | SideFile]:
        """Return all that lies beside the manifest, in the folder."""
        shards = [shard for shards in self.splits.values() for shard in shards]
        skips = [self.skips.file] if self.skips and self.skips.file else []
        return [*(file for shard in shards for file in shard.files()), *skips]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into a folder, atomically."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        write_json(Path(folder) / FILE_NAME, {"version": _VERSION, **content})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ManifestError: missing folder or manifest, malformed, or of an unknown version or format.
        """
        path = Path(folder) / FILE_NAME
        content = _read(path)
        if content.pop("version", None) not in _READ_VERSIONS:
            known = " or ".join(map(str, _READ_VERSIONS))
            raise ManifestError(f"{path}: not of version {known}, which this program reads")
        if content.get("format") not in FORMATS:
            raise ManifestError(f"{path}: unknown format {content.get('format')!r} (known: {', '.join(FORMATS)})")
        try:
            _MANIFEST(content, "manifest")
            splits = {split: [Shard.of(shard) for shard in shards] for split, shards in content["splits"].items()}
            skips = {"skips": _skips_of(content["skips"])} if "skips" in content else {}
            manifest = cls(**{**content, "splits": splits, **skips})
            manifest.check_names()
        except Malformed as error:
            raise ManifestError(f"{path}: malformed: {error}") from None
        return manifest

    def check_names(self) -> None:
        """Check that names fit the format and differ, and that all that counts classes agrees; Malformed if not."""
        names = Counter(file.name for file in self.files())
        if twice := [name for name, times in names.items() if times > 1]:
            raise Malformed(f"{twice[0]} is named twice")
        for name in (shard.name for shards in self.splits.values() for shard in shards):
            if not name.endswith(EXTENSION[self.format]):
                raise Malformed(f"{name} is no {EXTENSION[self.format]} file, which the format {self.format!r} has")
        for split, counts in self.class_counts.items():
            if split not in self.splits or len(counts) != len(self.classes):
                raise Malformed(f"class_counts.{split}: not a count for each of the {len(self.classes)} classes")

    def check_shards(self, folder: str | os.PathLike[str], most: int | None = None) -> None:
        """Check that every shard is there with the stated size, and not another one: hardly any content is read.

        Files of names are left alone: without one, samples have numbers only. most: of more shards, so many evenly
        spread ones are looked at.

        Raises:
            ManifestError: names the first shard that is missing, of another size, or replaced by another.
        """
        shards = [shard for shards in self.splits.values() for shard in shards]
        for shard in (shards[place] for place in spread(len(shards), most or len(shards))):
            for file in shard.files():
                if file is not shard.names:
                    _check_size(Path(folder) / file.name, file.num_bytes)
            path = Path(folder) / shard.name
            seen = glimpses(path) if shard.glimpses else ()
            # One that differs may be a damaged image, which the loader bears; another shard differs everywhere.
            if sum(a != b for a, b in zip(seen, shard.glimpses, strict=False)) > 1:
                raise ManifestError(
                    f"{path}: another file than was converted, of the same size: run dataprep/verify.py"
                )


_SIDE_FILE = {"name": plain_name, "num_bytes": count, "sha256": text}
SHARD = fields(
    {**_SIDE_FILE, "num_samples": count},
    {"index": none_or(fields(_SIDE_FILE)), "glimpses": list_of(text), "names": none_or(fields(_SIDE_FILE))},
)
_MANIFEST = fields(
    {
        "format": text,
        "classes": list_of(text),
        "splits": table_of(list_of(SHARD)),
        "pixel_mean": list_of(number(0, 1), 3),
        "pixel_std": list_of(number(0, 1), 3),
        "settings": table_of(any_value),
        "skipped": list_of(fields({"path": text, "reason": text})),
        "class_counts": table_of(list_of(count)),
        "versions": table_of(text),
    },
    {
        "unused": list_of(fields({"reason": text, "count": count, "first": list_of(text)})),
        "notes": list_of(text),
        "skips": fields({"count": count, "reasons": table_of(count), "file": fields(_SIDE_FILE)}),
    },
)


def spread(count: int, most: int) -> list[int]:
    """Return the numbers below a count, of more than `most` so many that are evenly spread, the first and last too."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64).tolist()


def _skips_of(content: dict[str, Any]) -> Skips:
    return Skips(**{**content, "file": SideFile(**content["file"])})


def check_finished(folder: Path) -> None:
    """Raise ManifestError for what a conversion has left that has not ended: without its manifest it is but a part."""
    if (folder / STATE_FILE).exists() and not (folder / FILE_NAME).exists():
        raise ManifestError(f"{folder}: an unfinished conversion: run the same dataprep/convert.py again")


def glimpses(path: Path) -> tuple[str, ...]:
    """Return digests of a few short parts of a file, by which a shard is told from another of the same size.

    Raises OSError, also for what is no regular file.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        found = []
        for part in range(1, _GLIMPSES + 1):
            file.seek(size * part // (_GLIMPSES + 1))
            found.append(hashlib.sha256(file.read(_GLIMPSE_BYTES)).hexdigest()[:16])
    return tuple(found)


def wrong_label(label_N: np.ndarray, num_classes: int) -> str:
    """Say which is the first label that is neither -1 nor one of so many classes; "" if all are."""
    wrong_N = (label_N < -1) | (label_N >= num_classes)
    row = int(wrong_N.argmax()) if wrong_N.any() else -1
    return "" if row < 0 else f"a label outside the {num_classes} classes: {label_N[row]} of sample {row}"


def _check_size(path: Path, expected: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ManifestError(f"{path}: not a regular file")
    if status.st_size != expected:
        raise ManifestError(f"{path}: {status.st_size} bytes, but the manifest says {expected}")


def _read(path: Path) -> dict[str, Any]:
    folder = path.parent
    if not folder.is_dir():
        raise ManifestError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} is not a converted data set (no {FILE_NAME}): run python dataprep/convert.py"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ManifestError(f"{path}: malformed: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: malformed: not a JSON object")
    return content
