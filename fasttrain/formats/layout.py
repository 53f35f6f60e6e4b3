"""What a tree of folders and images is as a data set: flat, a folder per class, or splits of these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from fasttrain.formats.listing import IMAGE_EXTENSIONS, Listing, Sample, SourceError, Unused
from fasttrain.formats.splits import is_neutral, is_of_images, pick, split_of, splits_of

Skipped = list[dict[str, str]]


class Tree(Protocol):
    """Folders and the image files in them.

    Attributes:
        skipped: images that can't be used, as {"path": ..., "reason": ...}.
        unused: what is no image.
    """

    skipped: Skipped
    unused: Unused

    @property
    def root(self) -> str: ...

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        """Return the sorted names of the sub-folders and the unlabelled images directly in a folder ("" = root).

        What else is there is counted, so a folder is asked for once.
        """


class Layout(NamedTuple):
    """What a tree of images holds: classes by name, splits, and what is not among the samples.

    notes: sentences about what may have been read in another way than was meant.
    """

    classes: tuple[str, ...]
    splits: dict[str, Listing]
    skipped: Skipped
    unused: Unused
    notes: list[str]


def lines_of(layout: Layout) -> tuple[str, ...]:
    """Return what a person should know of a layout: how many images can't be used, what else is there, the notes."""
    lines = list(layout.notes)
    if layout.skipped:
        first = layout.skipped[0]
        lines.append(f"{len(layout.skipped)} images can't be used, the first is {first['path']}: {first['reason']}")
    return (*lines, *([str(layout.unused)] if layout.unused.count else []))


class _Once:
    """A tree of which some folders are looked at before they are read; each is asked for once."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._seen: dict[str, tuple[list[str], list[Sample]]] = {}
        self._holding = set[str]()  # folders that are known to hold images

    def peek(self, folder: str) -> tuple[list[str], list[Sample]]:
        if folder not in self._seen:
            self._seen[folder] = self.tree.entries(folder)
        return self._seen[folder]

    def take(self, folder: str) -> tuple[list[str], list[Sample]]:
        return self._seen.pop(folder, None) or self.tree.entries(folder)

    def path(self, folder: str) -> Path:
        return Path(self.tree.root) / folder

    def holds_images(self, folder: str) -> bool:
        """Whether there is an image anywhere below."""
        left = [] if folder in self._holding else [folder]
        while left:
            here = left.pop()
            names, files = self.peek(here)
            if files:
                while here != folder:
                    self._holding.add(here)
                    here = here.rpartition("/")[0]
                self._holding.add(folder)
                break
            left += (_below(here, name) for name in reversed(names))
        return folder in self._holding

    def images(self, folder: str) -> Iterator[Sample]:
        """Take all images below, those of a folder before those of its sub-folders."""
        left = [folder]
        while left:
            here = left.pop()
            names, files = self.take(here)
            yield from files
            left += (_below(here, name) for name in reversed(names))


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def arrange(tree: Tree) -> Layout:
    """Return the classes, sorted by name, the splits of a tree, and what is not used.

    Raises:
        SourceError: no images, images beside class folders, validation splits only, or a class of the validation
            split that the training split lacks.
    """
    once, notes = _Once(tree), list[str]()
    folders = _split_folders(once)
    classes, train = _read_split(once, folders["train"], notes)
    splits = {"train": train}
    if "val" in folders:
        val_classes, splits["val"] = _read_split(once, folders["val"], notes, classes)
        if train and (unknown := sorted(set(val_classes) - set(classes))):
            raise SourceError(
                f"{once.path(folders['val'])}: class {unknown[0]!r} is not in {once.path(folders['train'])}"
            )
        if classes and not val_classes:
            notes.append(f"the images of the validation split, in {folders['val']}, have no labels")
    for split, samples in splits.items():
        if not samples:
            rest = f"; {tree.unused}" if tree.unused.count else ""
            raise SourceError(f"{once.path(folders[split])}: no images ({', '.join(IMAGE_EXTENSIONS)}){rest}")
    return Layout(classes, splits, tree.skipped, tree.unused, notes)


def _split_folders(once: _Once) -> dict[str, str]:
    """Return split name -> folder ("" = the root itself); what lies beside them is counted.

    A folder that alone holds images is looked through, at any depth.
    """
    folder = ""
    while True:
        names, files = once.peek(folder)
        if found := _splits_in(once, folder):
            for image in files:
                once.tree.unused.add("images beside the splits", image.path)
            for path in (_below(folder, name) for name in names):
                if path not in found.values():
                    _count_beside(once, path)
            return found
        paths = (_below(folder, name) for name in names)
        holding = [] if files else list(islice(filter(once.holds_images, paths), 2))
        if len(holding) != 1:
            return {"train": folder}
        folder = holding[0]


def _splits_in(once: _Once, folder: str) -> dict[str, str]:
    """Return split name -> folder; {} where the folders are classes. Raises SourceError for validation splits alone."""
    split_by_name = splits_of(once.peek(folder)[0])
    splits = list(split_by_name.values())
    picked = pick(splits)
    if not (picked.train or picked.val):
        return {}
    paths = (_below(folder, name) for name, split in split_by_name.items() if not split)
    classes = not (picked.train and picked.val) and any(map(once.holds_images, paths))
    if classes or (not picked.train and len(splits) - splits.count("") == 1):
        return {}
    if not picked.train:
        only = ", ".join(name for name, split in split_by_name.items() if split)
        raise SourceError(f"{once.path(folder)}: holds {only}, but no training split: name one of them")
    return {
        split: _below(folder, min((n for n, s in split_by_name.items() if s == name), key=lambda n: (len(n), n)))
        for split, name in picked._asdict().items()
        if name
    }


def _count_beside(once: _Once, path: str) -> None:
    count = sum(1 for _ in once.images(path))
    if count:
        split = split_of(os.path.basename(path), whole=True)
        once.tree.unused.add(f"images of the split {split}" if split else "images beside the splits", path, count)


def _read_split(
    once: _Once, folder: str, notes: list[str], known: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Listing]:
    """Return the classes found and the samples of one split; labels count `known`, or else what was found."""
    folder = _through_neutral(once, folder, known)
    names, files = once.take(folder)
    numbers = {name: number for number, name in enumerate(known)}
    found, nested = list[str](), list[str]()

    def in_classes() -> Iterator[Sample]:
        for name in names:
            number = numbers.get(name, -1) if known else len(found)
            path = _below(folder, name)
            only_folders = _holds_only_folders(once, path)
            for image in once.images(path):
                if not found or found[-1] != name:
                    found.append(name)
                    nested.extend([path] if only_folders else [])
                yield image._replace(label=number)
            if not found or found[-1] != name:
                once.tree.unused.add("folders without images", path)

    samples = Listing(_no_images_beside(in_classes(), files, once.path(folder)))
    if nested:
        notes.append(
            f"{len(nested)} of {len(found)} class folders hold nothing but folders of images, the first is {nested[0]}:"
            " if those are the classes, or splits, name a folder that holds them"
        )
    if not known and (odd := next(filter(is_of_images, found), None)):
        notes.append(f"one of {len(found)} classes is called {odd!r}: if that folder holds all images, name it")
    return tuple(found), samples if found else Listing(files)


def _holds_only_folders(once: _Once, folder: str) -> bool:
    """Whether a folder, or the only one in it, holds several folders and no image."""
    names, files = once.peek(folder)
    while len(names) == 1 and not files:
        folder = _below(folder, names[0])
        names, files = once.peek(folder)
    return len(names) > 1 and not files


def _through_neutral(once: _Once, folder: str, known: tuple[str, ...]) -> str:
    """Return the folder of the classes, or images: `train/images` or `train/train` where `train` holds no others."""
    while True:
        names, files = once.peek(folder)
        if files or not any(_says_nothing(name, folder) for name in names):
            return folder
        holding = list(islice((name for name in names if once.holds_images(_below(folder, name))), 2))
        if len(holding) != 1 or not _says_nothing(holding[0], folder) or holding[0] in known:
            return folder
        folder = _below(folder, holding[0])


def _says_nothing(name: str, above: str) -> bool:
    return is_neutral(name) or bool(split_of(name, whole=True)) or name == os.path.basename(above)


def _no_images_beside(samples: Iterable[Sample], files: list[Sample], where: Path) -> Iterator[Sample]:
    for sample in samples:
        if files:
            raise SourceError(f"{where}: holds images beside folders of images, so classes cannot be told")
        yield sample
