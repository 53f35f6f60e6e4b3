"""Which names speak of a training and a validation split, and which images are set apart where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fasttrain.formats.listing import Listing, SourceError

# The first that is there is used.
TRAIN_NAMES = ("train", "trainval", "unlabeled")
VAL_NAMES = ("val", "valid", "validation", "dev", "eval", "test")

_SPELLINGS = {
    **{name: name for name in (*TRAIN_NAMES, *VAL_NAMES)},
    "training": "train", "validating": "validation", "development": "dev", "evaluation": "eval", "testing": "test",
    "unlabelled": "unlabeled",
}  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+")
_GLUED = re.compile(r"(.+?)(?:sets?|images?|imgs?|data|split|folder|dir)")
# A folder's name may hold these beside the split; any other word makes it a class (`train_station`).
_NEUTRAL = frozenset(
    (
        "images", "image", "imgs", "img", "pictures", "photos", "set", "sets", "data", "dataset", "datasets", "split",
        "splits", "part", "folder", "dir", "files", "jpeg", "jpegs", "jpg", "png", "raw", "full", "original", "resized",
        "cropped", "small", "large", "mini", "partial", "px", "x", "v", "ilsvrc", "imagenet", "cls", "loc", "clsloc",
        "coco", "voc", "cifar", "mnist", "jpegimages",
    )
)  # fmt: skip


def split_of(name: str, whole: bool = False) -> str:
    """Return the split that a name speaks of: one of TRAIN_NAMES or VAL_NAMES, or "" for none.

    Case and digits do not matter: Training, TRAIN, train2017 and trainset are all "train". whole: of a folder, where
    each word must be a split's, or neutral as in ILSVRC2012_img_train.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    found = [(word, _spelled(word)) for word in words]
    if whole and not all(split or word in _NEUTRAL for word, split in found):
        return ""
    splits = list(dict.fromkeys(split for _, split in found if split))
    if len(splits) > 1 and "train" in splits:
        return "trainval" if splits == ["train", "val"] else ""
    return splits[0] if splits else ""


def splits_of(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each of some folders that lie side by side, "" for none.

    Beside words of other kinds, a split's word makes a class, as `bullet_train`; but not if the other words are those
    of one pair, as in `DIV2K_train_HR` and `DIV2K_valid_HR`.
    """
    found = {name: split_of(name, whole=True) for name in names}
    picked = pick(list(found.values()))
    if not (picked.train and picked.val):
        by_rest: dict[tuple[str, ...], dict[str, str]] = {}
        for name in found:
            if split := split_of(name):
                by_rest.setdefault(_other_words(name), {})[name] = split
        pairs = [group for group in by_rest.values() if all(pick(list(group.values())))]
        if len(pairs) == 1:
            return {name: pairs[0].get(name, "") for name in found}
    return found


def _other_words(name: str) -> tuple[str, ...]:
    words = (word.lower() for word in _WORD.findall(name))
    return tuple(word for word in words if word not in _NEUTRAL and not _spelled(word))


def _spelled(word: str) -> str:
    glued = _GLUED.fullmatch(word)
    return _SPELLINGS.get(word) or (_SPELLINGS.get(glued[1], "") if glued else "")


def is_of_images(name: str) -> bool:
    """Whether the name of a folder says that it holds images of every class: `images`, `JPEGImages`."""
    return is_neutral(name) and any(word in name.lower() for word in ("image", "img", "photo", "picture", "jp"))


def is_neutral(name: str) -> bool:
    """Whether the name of a folder says no more than that images lie in it: `images`, `JPEGImages`, `data`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and all(word in _NEUTRAL for word in words)


class Picked(NamedTuple):
    """Names of splits: of the training split, of the validation split ("" = none)."""

    train: str
    val: str


def pick(splits: Sequence[str]) -> Picked:
    """Choose training and validation among the splits that are there, as split_of names them."""
    return Picked(*(next((name for name in names if name in splits), "") for names in (TRAIN_NAMES, VAL_NAMES)))


def seeded_order(count: int, seed: int) -> np.ndarray:
    """Return positions in a seeded order: that of a Philox stream's numbers, which no version of NumPy changes."""
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


def set_apart(splits: Mapping[str, Listing], fraction: float, seed: int, where: object) -> np.ndarray:
    """Return the rows of "train" that make the validation split, sorted: this fraction of every class, rounded.

    They are those of a class that come first in the seeded order. Memory grows with the rows that are returned.

    Raises:
        SourceError: there is a validation split already, or a split would be left without images.
    """
    if "val" in splits:
        raise SourceError(f"{where} has a validation split already, so none can be set apart")
    train, count_C = splits["train"], np.zeros(0, np.int64)
    for label_N in train.labels():
        found_C = np.bincount(label_N + 1, minlength=len(count_C))  # -1 is a class, too
        found_C[: len(count_C)] += count_C
        count_C = found_C
    wanted_C, spare = np.round(count_C * fraction).astype(np.int64), 1
    while (row_V := _first_of_each(train, seed, count_C, wanted_C, spare)) is None:
        spare *= 2
    for split, number in (("train", len(train) - len(row_V)), ("val", len(row_V))):
        if not number:
            raise SourceError(
                f"{where}: setting apart {fraction} of each class, rounded to whole images,"
                f" leaves none for the split {split!r}"
            )
    return row_V


def _first_of_each(
    train: Listing, seed: int, count_C: np.ndarray, wanted_C: np.ndarray, spare: int
) -> np.ndarray | None:
    """Return the rows of so many samples of every class that come first in the seeded order; None if spare is too low.

    Only samples with small numbers are looked at: those that are wanted and, of each class, a few more.
    """
    part_C = (wanted_C + spare * (10 * np.sqrt(wanted_C) + 20)) / np.maximum(count_C, 1)
    limit_C = (np.minimum(part_C, 1) * (2**64 - 2048)).astype(np.uint64)
    limit_C[part_C >= 1] = np.uint64(2**64 - 1)
    numbers, at, found = np.random.Philox(key=seed), 0, list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    for label_N in train.labels():
        number_N = numbers.random_raw(len(label_N))
        small_V = np.flatnonzero(number_N <= limit_C[label_N + 1])
        found.append((at + small_V, number_N[small_V], label_N[small_V] + 1))
        at += len(label_N)
    row_V, number_V, class_V = (np.concatenate(column) for column in zip(*found, strict=True))
    order_V = np.lexsort((row_V, number_V, class_V))
    seen_C = np.bincount(class_V, minlength=len(count_C))
    if np.any(seen_C < wanted_C):
        return None
    rank_V = np.arange(len(row_V)) - np.repeat(np.cumsum(seen_C) - seen_C, seen_C)
    return np.sort(row_V[order_V][rank_V < np.repeat(wanted_C, seen_C)])
