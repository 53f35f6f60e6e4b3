"""Which images keep their labels in semi-supervised protocols: a fraction of each class, or those of a list."""

from __future__ import annotations

import pathlib
from collections import defaultdict

import numpy as np

from fasttrain.input import Store
from fasttrain.system.cli import warn
from fasttrain.system.errors import DataError, UserError
from fasttrain.system.regular import read_at_most

MAX_LIST_BYTES = 1 << 28
MAX_UNMATCHED = 0.01  # of a list's names may be missing: a conversion leaves damaged images out


def stratified(label_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Places of a fraction of each class's images, one at least, ascending, int64: a function of labels and seed.

    label_N: int64; images without a label, below 0, are not chosen. Of one seed, a larger fraction has all of a smaller
    one's.
    """
    order_N = np.random.Generator(np.random.Philox(key=seed)).permutation(len(label_N))
    shuffled_N = label_N[order_N]
    chosen = []
    for label in np.unique(label_N[label_N >= 0]):
        of_class = order_N[shuffled_N == label]
        chosen.append(of_class[: max(1, int(fraction * len(of_class) + 0.5))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def listed(store: Store, path: pathlib.Path) -> np.ndarray:
    """Places in a store of the images that a text file names, one a line, ascending, int64.

    A name is what the source called the image, with as many of its folders as the line has: SimCLR's lists of ImageNet
    (google-research/simclr, imagenet_subsets) have none. Raises UserError where more than MAX_UNMATCHED of the names
    are of no image, or one is of several.
    """
    names = _names(path)
    depths = sorted({name.count("/") + 1 for name in names})
    places: dict[str, list[int]] = defaultdict(list)
    for index in range(store.num_samples):
        parts = store.source_name(index).split("/")
        for depth in depths:
            if (tail := "/".join(parts[-depth:])) in names and depth <= len(parts):
                places[tail].append(index)
    if several := next((name for name in names if len(places.get(name, ())) > 1), ""):
        raise UserError(f"{path}: {several} is the name of {len(places[several])} images: give their folders, too")
    missing = [name for name in names if name not in places]
    if missing:
        said = f"{path}: {len(missing)} of {len(names)} names are of no training image, such as {missing[0]}"
        if len(missing) > MAX_UNMATCHED * len(names):
            raise UserError(f"{said}; an image is called {store.source_name(0)}")
        warn(said)
    return np.array(sorted({index for found in places.values() for index in found}), dtype=np.int64)


def _names(path: pathlib.Path) -> dict[str, None]:
    """Those in a list, in its order, each once."""
    try:
        text = read_at_most(path, MAX_LIST_BYTES).decode("utf-8-sig")  # Windows begins its files with a mark
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text of names, one a line") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    names = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{path} names no image")
    return names


def labels_of(store: Store) -> np.ndarray:
    """Every image's label, int64; -1 where it can't be read. Raises UserError for an image without one."""
    label_N = np.full(store.num_samples, -1, dtype=np.int64)
    for index in range(store.num_samples):
        try:
            label_N[index] = store.labels(np.array([index]))[0]
        except (DataError, OSError):
            continue
        if label_N[index] < 0:
            raise UserError(f"{store.name(index)} has no label, which semi needs of every training image")
    return label_N
