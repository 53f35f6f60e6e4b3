"""Plain folders of images: what is listed of them, and how a file is read."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from pathlib import Path

from fasttrain.formats.layout import Layout, Skipped, arrange
from fasttrain.formats.listing import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    Listing,
    Sample,
    SourceError,
    Unused,
    file_states,
    listing_digests,
    other_file,
)  # fmt: skip
from fasttrain.formats.signature import HEAD_BYTES, is_image
from fasttrain.system.regular import open_regular

_TIMES_ENTERED = 8  # that links may lead to one folder: folders that link to each other can be walked in endless ways


class FolderTree:
    """A folder on disk. Hidden entries are left out without a word; links are followed, unless they lead back."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.skipped: Skipped = []
        self.unused = Unused()
        self._entered = Counter[str]()

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        folders, files, others = [], [], []
        prefix = f"{folder}/" if folder else ""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                named_image = name.lower().endswith(IMAGE_EXTENSIONS)
                if named_image and entry.is_file(follow_symlinks=False):  # nearly all: no more is asked of them
                    files.append(name)
                    continue
                is_folder, is_file = _kind(entry)
                if is_folder and not (named_image and not os.listdir(entry.path)):
                    folders.append(name)
                elif is_file and (named_image or ("." not in name and _starts_as_image(entry.path))):
                    files.append(name)
                else:
                    others.append(name)
        for name in sorted(others):
            self._count(prefix + name)
        folders = [name for name in sorted(folders) if self._may_enter(folder, name)]
        return folders, [Sample(prefix + name, -1) for name in sorted(files)]

    def _count(self, path: str) -> None:
        if not path.lower().endswith(IMAGE_EXTENSIONS):
            self.unused.add(other_file(path), path)
            return
        try:
            is_folder = stat.S_ISDIR(os.stat(os.path.join(self.root, path)).st_mode)
            reason = "an empty folder" if is_folder else "not a regular file"
        except OSError as error:
            nowhere = error.errno == errno.ENOENT
            reason = "a link that leads nowhere" if nowhere else f"can't be read: {error.strerror}"
        self.skipped.append({"path": path, "reason": reason})

    def _may_enter(self, folder: str, name: str) -> bool:
        path = os.path.join(self.root, folder, name)
        if not os.path.islink(path):
            return True
        target = os.path.realpath(path)
        parts = folder.split("/") if folder else []
        above = (os.path.join(self.root, *parts[:depth]) for depth in range(len(parts) + 1))
        self._entered[target] += 1
        shown = f"{folder}/{name}" if folder else name
        if any(os.path.commonpath([target, os.path.realpath(one)]) == target for one in above):
            self.unused.add("links to a folder that they lie in", shown)
        elif self._entered[target] > _TIMES_ENTERED:
            self.unused.add(f"links to a folder that {_TIMES_ENTERED} others led to", shown)
        else:
            return True
        return False


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether an entry is, or leads to, a folder and a regular file."""
    try:
        is_folder = entry.is_dir()
        return is_folder, not is_folder and entry.is_file()
    except OSError:  # a link to itself
        return False, False


def _starts_as_image(path: str) -> bool:
    try:
        with open_regular(path, buffering=0) as file:
            return is_image(file.read(HEAD_BYTES))
    except OSError:
        return False


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


def list_folder(root: Path) -> Layout:
    """Return the classes and the splits of a folder of images. Only files without an extension are opened.

    The folder may hold images only (no labels), one folder per class (sub-folders of a class belong to it), or folders
    for a training and a validation split, each of either kind. Links are followed, unless they lead back. What is no
    image is counted; hidden entries are ignored.

    Raises:
        SourceError: missing or unreadable folder, and as arrange.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    try:
        return arrange(FolderTree(str(root)))
    except OSError as error:
        raise SourceError(f"{error.filename or root}: {error.strerror}") from None


def folder_fingerprint(root: Path, classes: tuple[str, ...], splits: dict[str, Listing]) -> str:
    """Return the SHA-256 (hex) of every image's split, path, label and size: a copy of the folder has the same."""
    return listing_digests(classes, splits, lambda sample: file_states(os.path.join(root, sample.path))[:1], count=1)[0]
