"""Where images come from: a folder of image files, read in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataprep import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Folder names taken as the validation split beside `train`; the first that exists is used.
VAL_FOLDERS = ("val", "valid", "validation", "test")


class SourceError(DataError):
    """The source cannot be used; the text is one line."""


@dataclass(frozen=True)
class Sample:
    """One image file: path relative to the source's root, with forward slashes; label -1 = no label."""

    path: str
    label: int


@dataclass(frozen=True)
class Source:
    """The images of one data set: splits "train" and perhaps "val", each in sorted order; classes sorted by name."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]


def scan_folder(root: str | os.PathLike[str]) -> Source:
    """List the images of a folder, without opening any.

    The folder may hold images only (no labels), one folder per class (sub-folders of a class belong to it), or `train`
    and one of VAL_FOLDERS, each of either kind. Hidden entries, files of other extensions and links to folders are
    ignored, and so are folders without images.

    Raises:
        SourceError: missing or unreadable folder, no images, images beside class folders, or a class of the
            validation split that the training split lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise SourceError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    try:
        return _scan(root)
    except OSError as error:
        raise SourceError(f"{error.filename or root}: {error.strerror}") from None


def fingerprint(source: Source, times: bool = False) -> str:
    """Return the SHA-256 (hex) of every sample's split, path, label and size in bytes; with times, also of its mtime.

    Without times a copy of the source has the fingerprint of the source.
    """
    digest = hashlib.sha256("\0".join(source.classes).encode("utf-8", "surrogateescape"))
    for split, samples in source.splits.items():
        for sample in samples:
            try:
                status = os.stat(os.path.join(source.root, sample.path))
                state = f"{status.st_size} {status.st_mtime_ns}" if times else f"{status.st_size}"
            except OSError:  # a dangling link: the conversion reports and skips it
                state = "unreadable"
            digest.update(f"{split}\0{sample.path}\0{sample.label} {state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def shuffled_splits(source: Source, val_fraction: float, seed: int) -> dict[str, list[Sample]]:
    """Shuffle each split; with val_fraction, set apart that part of every class as "val" (rounded to whole images).

    Raises SourceError if the source has a val split already, or the fraction leaves a split without images.
    """
    splits = {split: _shuffled(samples, seed) for split, samples in source.splits.items()}
    if not val_fraction:
        return splits
    if "val" in splits:
        raise SourceError(f"{source.root} has a validation split already, so none can be set apart")
    left = {label: round(count * val_fraction) for label, count in Counter(s.label for s in splits["train"]).items()}
    chosen: dict[str, list[Sample]] = {"train": [], "val": []}
    for sample in splits["train"]:
        chosen["val" if left[sample.label] else "train"].append(sample)
        left[sample.label] = max(0, left[sample.label] - 1)
    for split, samples in chosen.items():
        if not samples:
            raise SourceError(
                f"{source.root}: setting apart {val_fraction} of the images leaves none for the split {split!r}"
            )
    return chosen


def _shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    """Return the samples in a seeded order: that of a Philox stream's numbers, which no version of NumPy changes."""
    keys = np.random.Philox(key=seed).random_raw(len(samples))
    return [samples[i] for i in np.argsort(keys, kind="stable")]


def _scan(root: Path) -> Source:
    folders = _split_folders(root)
    classes, train = _read_split(root, folders["train"])
    splits = {"train": train}
    if "val" in folders:
        val_classes, val = _read_split(root, folders["val"], classes)
        if unknown := sorted(set(val_classes) - set(classes)):
            raise SourceError(f"{root / folders['val']}: class {unknown[0]!r} is not in {root / folders['train']}")
        splits["val"] = val
    for split, samples in splits.items():
        if not samples:
            raise SourceError(f"{root / folders[split]}: no images ({', '.join(EXTENSIONS)})")
    return Source(root, classes, splits)


def _split_folders(root: Path) -> dict[str, str]:
    """Return split name -> folder relative to root ("" = the root itself)."""
    names, _ = _entries(str(root))
    val = next((name for name in VAL_FOLDERS if name in names), None)
    if "train" in names and val:
        return {"train": "train", "val": val}
    return {"train": "train"} if names == ["train"] else {"train": ""}


def _read_split(root: Path, folder: str, known: tuple[str, ...] = ()) -> tuple[tuple[str, ...], list[Sample]]:
    """Return the classes (of `known` plus those found, sorted when nothing was known) and samples of one split."""
    names, files = _entries(os.path.join(root, folder))
    prefix = f"{folder}/" if folder else ""
    by_class = {name: list(_images_below(str(root), prefix + name)) for name in names}
    found = tuple(name for name in names if by_class[name])
    if found and files:
        raise SourceError(f"{root / folder}: holds images beside folders of images, so classes cannot be told")
    if not found:
        return (), [Sample(prefix + name, -1) for name in files]
    numbers = {name: number for number, name in enumerate(known or found)}
    samples = [Sample(path, numbers.get(name, -1)) for name in found for path in by_class[name]]
    return found, samples


def _images_below(root: str, folder: str) -> Iterator[str]:
    names, files = _entries(os.path.join(root, folder))
    yield from (f"{folder}/{name}" for name in files)
    for name in names:
        yield from _images_below(root, f"{folder}/{name}")


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of the sub-folders and of the image files directly in a folder."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or _dangles(entry)):
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _dangles(entry: os.DirEntry[str]) -> bool:
    # Listed although it leads nowhere, so that a person learns of the missing image.
    return entry.is_symlink() and not os.path.exists(entry.path)
