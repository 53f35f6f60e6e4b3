"""Existing .beton files as a data set: what stock FFCV wrote, or single shards of ours. No manifest describes them.

Splits follow the names of files (`train.beton`, `imagenet_val_400.ffcv`). Labels are whole numbers without names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.formats.beton import BetonError, BetonReader
from fasttrain.formats.listing import Unused, other_file
from fasttrain.formats.manifest import check_finished, glimpses
from fasttrain.formats.splits import pick, split_of

EXTENSIONS = (".beton", ".ffcv")
MAX_CLASSES = 1 << 16  # a larger number names no class: it is an identifier or a count


class BetonSet(NamedTuple):
    """Open files by split ("train", perhaps "val"), and the names of classes.

    label_S: by split, the labels of each of its files, int64; -1 for none, others below the number of classes.
    unused: files of no split, and what else lies in the folder.
    notes: what else a person should know, a line each.
    """

    splits: dict[str, list[BetonReader]]
    classes: tuple[str, ...]
    label_S: dict[str, list[np.ndarray]]
    unused: Unused
    notes: list[str]

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of sizes, tables and a few short parts of each file: other images hardly keep all of these."""
        digest = hashlib.sha256()
        for reader in self.splits[split]:
            for column_N in (reader.mode_N, reader.height_N, reader.width_N, reader.pointer_N, reader.size_N):
                digest.update(column_N.data)
            digest.update(reader.label_N.data)
            digest.update(" ".join((str(reader.data.size), *glimpses(reader.path))).encode())
        return digest.hexdigest()


def beton_files(path: Path) -> list[Path]:
    """Return the .beton files of a folder, sorted, or the file itself; [] if it is anything else. Raises OSError."""
    if path.is_dir():
        names = (name for name in sorted(os.listdir(path)) if not name.startswith("."))
        return [path / name for name in names if name.lower().endswith(EXTENSIONS)]
    return [path] if path.name.lower().endswith(EXTENSIONS) else []


def open_betons(path: Path) -> BetonSet:
    """Open a .beton file, or those of a folder.

    Raises BetonError for a folder of none, or the first that is unsound; ManifestError for an unfinished conversion;
    OSError.
    """
    check_finished(path)
    files = beton_files(path)
    if not files:
        raise BetonError(f"{path}: no .beton files")
    by_split = _by_split(files)
    used = {file for found in by_split.values() for file in found}
    unused = _beside(path, used) if path.is_dir() else Unused()
    splits = {split: [BetonReader(file) for file in found] for split, found in by_split.items()}
    readers = [reader for found in splits.values() for reader in found]
    top = max(int(reader.label_N.max()) for reader in readers)
    odd = f"{path} counts as unlabelled: the label {top} is more than {MAX_CLASSES - 1}"
    num_classes = top + 1 if 0 <= top < MAX_CLASSES else 0
    label_S = {
        split: [np.where(reader.label_N < num_classes, reader.label_N, -1).clip(-1) for reader in found]
        for split, found in splits.items()
    }
    return BetonSet(splits, tuple(map(str, range(num_classes))), label_S, unused, [odd] if top >= MAX_CLASSES else [])


def _beside(folder: Path, used: set[Path]) -> Unused:
    unused = Unused()
    for path in sorted(folder.iterdir()):
        if path in used or path.name.startswith("."):
            continue
        if path.suffix.lower() in EXTENSIONS:
            unused.add("files whose names are of no split", path.name)
        else:
            unused.add("folders beside .beton files" if path.is_dir() else other_file(path.name), path.name)
    return unused


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split; without any for training, all are."""
    splits = [split_of(file.stem) for file in files]
    picked = pick(splits)
    if not picked.train:
        return {"train": list(files)}
    chosen = {"train": picked.train, **({"val": picked.val} if picked.val else {})}
    return {
        split: [file for file, found in zip(files, splits, strict=True) if found == name]
        for split, name in chosen.items()
    }
