"""Plain folders of images as a data set: flat, a folder per class, or `train` and `val` of these."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from fasttrain.formats.listing import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    VAL_NAMES,
    Listing,
    Sample,
    SourceError,
    file_state,
    listing_digest,
)  # fmt: skip


class Tree(Protocol):
    """Folders and the image files in them."""

    @property
    def root(self) -> str: ...

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        """Return the sorted names of the sub-folders and the unlabelled images directly in a folder ("" = root)."""


class FolderTree(NamedTuple):
    """A folder on disk; hidden entries, links to folders and files of other extensions are left out."""

    root: str

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        folders, files = [], []
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and (entry.is_file() or _dangles(entry)):
                    files.append(entry.name)
        prefix = f"{folder}/" if folder else ""
        return sorted(folders), [Sample(prefix + name, -1) for name in sorted(files)]


def read_regular(path: str) -> bytes:
    """Return the content of a regular file.

    Opening a FIFO, or reading a device, could wait for ever: it may have come after the folder was listed.

    Raises:
        SourceError: another kind of file, or larger than MAX_FILE_BYTES.
        OSError: it can't be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise SourceError(f"larger than {MAX_FILE_BYTES} bytes")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def arrange(tree: Tree) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """Return the classes, sorted by name, and the splits of a tree.

    Raises:
        SourceError: no images, images beside class folders, or a class of the validation split that the training
            split lacks.
    """
    folders = _split_folders(tree)
    classes, train = _read_split(tree, folders["train"])
    splits = {"train": train}
    if "val" in folders:
        val_classes, splits["val"] = _read_split(tree, folders["val"], classes)
        if unknown := sorted(set(val_classes) - set(classes)):
            raise SourceError(
                f"{_path(tree, folders['val'])}: class {unknown[0]!r} is not in {_path(tree, folders['train'])}"
            )
    for split, samples in splits.items():
        if not samples:
            raise SourceError(f"{_path(tree, folders[split])}: no images ({', '.join(IMAGE_EXTENSIONS)})")
    return classes, splits


def _path(tree: Tree, folder: str) -> Path:
    return Path(tree.root) / folder


def _dangles(entry: os.DirEntry[str]) -> bool:
    # Listed although it leads nowhere, so that a person learns of the missing image.
    return entry.is_symlink() and not os.path.exists(entry.path)


def _split_folders(tree: Tree) -> dict[str, str]:
    """Return split name -> folder ("" = the root itself)."""
    names, _ = tree.entries("")
    val = next((name for name in VAL_NAMES if name in names), None)
    if "train" in names and val:
        return {"train": "train", "val": val}
    return {"train": "train"} if names == ["train"] else {"train": ""}


def _read_split(tree: Tree, folder: str, known: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Listing]:
    """Return the classes found and the samples of one split; labels count `known`, or else what was found."""
    names, files = tree.entries(folder)
    found: list[str] = []

    def in_classes() -> Iterator[Sample]:
        for name in names:
            number = len(found) if not known else known.index(name) if name in known else -1
            images = _images_below(tree, f"{folder}/{name}" if folder else name)
            for image in images:
                if not found or found[-1] != name:
                    found.append(name)
                yield image._replace(label=number)

    samples = Listing(_no_images_beside(in_classes(), files, _path(tree, folder)))
    return tuple(found), samples if found else Listing(files)


def _no_images_beside(samples: Iterable[Sample], files: list[Sample], where: Path) -> Iterator[Sample]:
    for sample in samples:
        if files:
            raise SourceError(f"{where}: holds images beside folders of images, so classes cannot be told")
        yield sample


def _images_below(tree: Tree, folder: str) -> Iterator[Sample]:
    names, files = tree.entries(folder)
    yield from files
    for name in names:
        yield from _images_below(tree, f"{folder}/{name}")


def list_folder(root: Path) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """Return the classes and the splits of a folder of images, without opening any.

    The folder may hold images only (no labels), one folder per class (sub-folders of a class belong to it), or `train`
    and one of VAL_NAMES, each of either kind. Hidden entries, files of other extensions and links to folders are
    ignored, and so are folders without images.

    Raises:
        SourceError: missing or unreadable folder, no images, images beside class folders, or a class of the
            validation split that the training split lacks.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    try:
        return arrange(FolderTree(str(root)))
    except OSError as error:
        raise SourceError(f"{error.filename or root}: {error.strerror}") from None


def folder_fingerprint(root: Path, classes: tuple[str, ...], splits: dict[str, Listing]) -> str:
    """Return the SHA-256 (hex) of every image's split, path, label and size: a copy of the folder has the same."""
    return listing_digest(classes, splits, lambda sample: file_state(os.path.join(root, sample.path)))
