"""The files that a source of several lies in: found in a folder or by a pattern, and told apart by split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fasttrain.formats.listing import SourceError, Unused, other_file
from fasttrain.formats.splits import pick, split_of, splits_of
from fasttrain.storage.patterns import expand

_SHARD = re.compile(r"(.*?)(\d+)(?:-of-\d+)?")


def source_files(root: Path, extension: str, unused: Unused) -> list[str]:
    """Return the files of an extension that a folder holds, root itself, or what it names as a pattern; sorted.

    Where a folder holds none, those below it are taken, at any depth. What else lies there is counted.

    Raises:
        SourceError: there are none.
        OSError: a folder can't be read.
    """
    if root.is_dir():
        found = sorted(_in_folder(root, extension, unused))
    else:  # the name of a file may hold brackets
        found = [str(root)] if root.exists() else expand(str(root))
    if not found:
        raise SourceError(f"{root}: no {extension} files")
    return found


def _in_folder(root: Path, extension: str, unused: Unused) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    found = list[str]()
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if not name.lower().endswith(extension) or not os.path.isfile(path):
                unused.add(other_file(name), os.path.relpath(path, root))
            elif found and os.path.dirname(found[0]) == str(root) != folder:
                unused.add(f"{extension} files in folders beside others", os.path.relpath(path, root))
            else:
                found.append(path)
    return found


def relative_names(files: Sequence[str]) -> list[str]:
    """Return the names of files below the folder that they have in common."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return [os.path.relpath(file, common) for file in files]


def shown_names(files: Sequence[str]) -> list[str]:
    """Return short names of files: the last part, with the folders that differ where that does not tell the split."""
    return [os.path.basename(name) if split_of(_stem(name)) else name for name in relative_names(files)]


def split_files(files: Sequence[str], unused: Unused) -> dict[str, list[int]]:
    """Return the positions of the training and validation files: by their names (`train-00000.tar`, `x_test.parquet`),
    else by the folders they lie in. Files of other splits are counted.

    Files of no split are the training split where only a validation split is named; all are one where none is.
    """
    names = shown_names(files)
    split_by_folder = _splits_of_folders(names)
    splits = [_split_of_file(name, split_by_folder) for name in names]
    picked = pick(splits)
    if not picked.train and (not picked.val or "" not in splits):
        return {"train": list(range(len(files)))}
    chosen = {"train": picked.train, **({"val": picked.val} if picked.val else {})}
    for name, split in zip(names, splits, strict=True):
        if split not in chosen.values():
            unused.add(f"files of the split {split}" if split else "files beside the splits", name)
    return {split: [row for row, found in enumerate(splits) if found == name] for split, name in chosen.items()}


def _splits_of_folders(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each folder that files lie in, at any depth: told by its name and those beside it."""
    beside: dict[str, set[str]] = {}
    for name in names:
        for folder in _folders(name):
            beside.setdefault(os.path.dirname(folder), set()).add(os.path.basename(folder))
    return {
        os.path.join(above, folder): split
        for above, folders in beside.items()
        for folder, split in splits_of(sorted(folders)).items()
    }


def _folders(name: str) -> list[str]:
    """Return the folders that a file lies in, the nearest first."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _split_of_file(name: str, split_by_folder: dict[str, str]) -> str:
    found = (split_of(_stem(name)), *(split_by_folder[folder] for folder in _folders(name)))
    return next(filter(None, found), "")


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def numbered(files: Sequence[str]) -> bool:
    """Whether the names of files are those of shards: contiguous numbers behind the same words."""
    numbers: dict[str, list[int]] = {}
    for file in files:
        found = _SHARD.fullmatch(_stem(file))
        if found is None:
            return False
        numbers.setdefault(os.path.join(os.path.dirname(file), found[1]), []).append(int(found[2]))
    return all(max(found) - min(found) < len(found) for found in numbers.values())
