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
        "cropped", "small", "large", "mini", "px", "x", "v", "ilsvrc", "imagenet", "cls", "loc", "clsloc", "coco",
        "voc", "cifar", "mnist", "jpegimages",
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


def set_apart(shuffled: Mapping[str, Listing], fraction: float, where: object) -> dict[str, Listing]:
    """Return "train" without, and "val" with, this fraction of every class, rounded: the samples that come first.

    Raises:
        SourceError: there is a validation split already, or a split would be left without images.
    """
    if "val" in shuffled:
        raise SourceError(f"{where} has a validation split already, so none can be set apart")
    chosen_N = _first_of_each(shuffled["train"].label_N, fraction)
    parts = {split: shuffled["train"].take(np.flatnonzero(chosen_N == (split == "val"))) for split in ("train", "val")}
    for split, samples in parts.items():
        if not samples:
            raise SourceError(
                f"{where}: setting apart {fraction} of each class, rounded to whole images,"
                f" leaves none for the split {split!r}"
            )
    return parts


def _first_of_each(label_N: np.ndarray, fraction: float) -> np.ndarray:
    """Return a bool_N that is true for this fraction, rounded, of the samples of every label: those that come first."""
    order_N = np.argsort(label_N, kind="stable")
    _, start_C, count_C = np.unique(label_N[order_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(label_N)) - np.repeat(start_C, count_C)
    chosen_N = np.zeros(len(label_N), bool)
    chosen_N[order_N] = rank_N < np.repeat(np.round(count_C * fraction), count_C)
    return chosen_N
