"""`manifest.json`: what a converted data set holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.system.durable import write_json
from fasttrain.system.errors import DataError

FILE_NAME = "manifest.json"
# How shards are stored, and how their names end.
EXTENSION = {"ffcv": ".beton", "webdataset": ".tar"}
FORMATS = tuple(EXTENSION)
_VERSION = 1
_GLIMPSES, _GLIMPSE_BYTES = 3, 1024  # a part holds some bytes of an image, even in a .tar of small ones


class ManifestError(DataError):
    """The folder is no complete, readable data set; the text is one line."""


@dataclass(frozen=True)
class Shard:
    """One file of a data set: name in the folder, samples in it, size in bytes, SHA-256 in hex; its index, if any.

    glimpses: see the function; empty for a shard without samples, and in sets that were made without them.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index: Index | None = None
    glimpses: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: dict[str, Any]) -> Shard:
        """Make a shard of its JSON object; TypeError if that is malformed."""
        index, seen = content.get("index"), content.get("glimpses", ())
        return cls(**{**content, "index": Index(**index) if index else None, "glimpses": tuple(seen)})

    def files(self) -> list[Shard | Index]:
        """Return the shard and its index: everything it consists of."""
        return [self, self.index] if self.index else [self]


@dataclass(frozen=True)
class Index:
    """DALI's index beside a .tar: name in the folder, size in bytes, SHA-256 in hex."""

    name: str
    num_bytes: int
    sha256: str


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
        skipped: images that could not be converted, as {"path": ..., "reason": ...}.
        class_counts: split name -> samples per class (empty: no labels).
        versions: the tools that made the shards, name -> version.
        unused: what was there and is no image, or was not asked for: reason -> {"count": ..., "first": [names]}.
        notes: sentences on how the source was read.
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
    unused: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of the checksums of a split's shards: it changes when any sample's content or number does."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.splits[split]).encode()).hexdigest()

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split; KeyError if there is no such split."""
        return sum(shard.num_samples for shard in self.splits[split])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into a folder, atomically."""
        write_json(Path(folder) / FILE_NAME, {"version": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ManifestError: missing folder or manifest, malformed, or of an unknown version or format.
        """
        path = Path(folder) / FILE_NAME
        content = _read(path)
        if content.pop("version", None) != _VERSION:
            raise ManifestError(f"{path}: not of version {_VERSION}, the one this program reads")
        if content.get("format") not in FORMATS:
            raise ManifestError(f"{path}: unknown format {content.get('format')!r} (known: {', '.join(FORMATS)})")
        try:
            content["splits"] = {
                split: [Shard.of(shard) for shard in shards] for split, shards in content["splits"].items()
            }
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{path}: malformed: {error}") from None

    def check_shards(self, folder: str | os.PathLike[str]) -> None:
        """Check that every shard is there with the stated size, and not another one: hardly any content is read.

        Raises:
            ManifestError: names the first shard that is missing, of another size, or replaced by another.
        """
        for shard in (shard for shards in self.splits.values() for shard in shards):
            for file in shard.files():
                _check_size(Path(folder) / file.name, file.num_bytes)
            path = Path(folder) / shard.name
            seen = glimpses(path) if shard.glimpses else ()
            # One that differs may be a damaged image, which the loader bears; another shard differs everywhere.
            if sum(a != b for a, b in zip(seen, shard.glimpses, strict=False)) > 1:
                raise ManifestError(
                    f"{path}: another file than was converted, of the same size: run dataprep/verify.py"
                )


def glimpses(path: Path) -> tuple[str, ...]:
    """Return digests of a few short parts of a file, by which a shard is told from another of the same size."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        found = []
        for part in range(1, _GLIMPSES + 1):
            file.seek(size * part // (_GLIMPSES + 1))
            found.append(hashlib.sha256(file.read(_GLIMPSE_BYTES)).hexdigest()[:16])
    return tuple(found)


def _check_size(path: Path, expected: int) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    if num_bytes != expected:
        raise ManifestError(f"{path}: {num_bytes} bytes, but the manifest says {expected}")


def _read(path: Path) -> dict[str, Any]:
    folder = path.parent
    if not folder.is_dir():
        raise ManifestError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    try:
        content = json.loads(path.read_bytes())
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
