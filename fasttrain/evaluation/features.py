"""Frozen features of a split, in a file while they are used: memory does not grow with the data set.

fp32 throughout: bf16 moves kNN by up to 0.33 points (docs/log.md).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.input import (
    Batch,
    LoaderError,
    Order,
    Place,
    Selection,
    Store,
    evenly,
    located,
    open_dataset,
    open_loader,
    seems_labelled,
)
from fasttrain.input.blanks import Blanks
from fasttrain.input.loader import MIN_FAILED
from fasttrain.input.stores import blocks_of
from fasttrain.kernels.augment import augment
from fasttrain.system.cli import warn
from fasttrain.system.durable import reason
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.system.progress import progress
from fasttrain.views.draw import center, crop_fraction

FAILED = -2  # the label of an image that can't be read
NAMED_FAILURES = 20
LARGEST = 1e15  # of a feature: squares of thousands of them still have a sum
MOST_ODD = 0.1  # of the images, whose features are no numbers or larger
_UNLABELLED = "images without labels; evaluations need a class folder for each"


class Rows(Protocol):
    """fp32 rows (N, F) in memory or on a disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...  # noqa: ANN401 - a slice, or an array of places


@dataclass(frozen=True)
class Features:
    """values_NF: rows of all images, in the store's order. index_M: the M of them that could be read, as places in the
    store. label_N: their labels, int64 (M,) on the CPU."""

    values_NF: Rows
    label_N: Tensor
    index_M: np.ndarray

    def __len__(self) -> int:
        return len(self.index_M)

    @property
    def width(self) -> int:
        return self.values_NF.shape[1]

    def rows(self, index: slice | np.ndarray, device: torch.device) -> Tensor:
        """Rows of images that could be read, by their place among these, fp32, on a device."""
        whole = len(self.index_M) == self.values_NF.shape[0]
        values = self.values_NF[index if whole else self.index_M[index]]
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)


class Preparation(NamedTuple):
    """How images become what a network takes, and what may fail on the way.

    size: side of a view; mean, std: of its normalisation. workers: decoding threads. max_failed_fraction: of images
    that can't be read and are left out; a few always may be, as in training.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    workers: int
    max_failed_fraction: float

    def most_failed(self, images: int) -> int:
        """Of so many images, those that may be left out."""
        return max(MIN_FAILED, int(self.max_failed_fraction * images))


def open_labelled(
    data: str | os.PathLike[str] | Place, loader: str, view_size: int, most: int = sys.maxsize,
    val_fraction: float = 0.0,
) -> tuple[Selection, Selection]:  # fmt: skip
    """The train and val splits, `most` samples of each. Raises UserError where labels are missing.

    data, val_fraction: as for open_dataset.
    A set without labels is known at once by a few; any other label is read with its image.
    """
    place = located(data)
    train, val = (
        evenly(open_dataset(place, split, loader, view_size, val_fraction), most) for split in ("train", "val")
    )
    if not train.classes or not all(seems_labelled(subset) for subset in (train, val)):
        raise UserError(f"{place} has {_UNLABELLED}")
    return train, val


def central_views(
    store: Store, device: torch.device, *, size: int, mean: tuple, std: tuple, batch_size: int, workers: int,
    max_failed_fraction: float, labels: bool = False, first: int = 0, each_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Batch, torch.Tensor]]:  # fmt: skip
    """Every image's central crop, as encoders are evaluated on it, in the store's order: batches, and their views
    (B, 3, size, size), fp32, channels-last, on the device.

    first: batches that are left out. each_batch is called before each batch and may raise to end it. A batch and its
    views are valid until the next one is asked for. Raises LoaderError when more than max_failed_fraction of the
    images or labels can't be read.
    """
    order = Order(store.num_samples, batch_size, shuffle=False, block_S=blocks_of(store))
    loader = open_loader(store, order, workers, device=device, max_failed_fraction=max_failed_fraction, labels=labels)
    loader.load_state_dict({"epoch": 0, "step": first})
    with contextlib.closing(loader):
        for batch in loader.epoch(0):
            each_batch()
            table = center(batch.height_B, batch.width_B, crop_fraction(size))
            (group,) = augment(batch.pixels, batch.offset_B, batch.height_B, batch.width_B, table, (size,), mean, std)
            yield batch, group[0]


@torch.no_grad()
def outputs(
    network: nn.Module, store: Store, device: torch.device, preparation: Preparation, limit: int,
    each_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, Tensor]]:  # fmt: skip
    """Run `network` (N, 3, size, size) → (N, F), in evaluation mode, over the central crop of every image, in order:
    rows (B, F) fp32 and labels (B,), FAILED where an image or its label can't be read.

    each_batch is called before each batch and may raise to end it. Raises LoaderError as soon as more than `limit`
    images can't be read, RunError as soon as more than MOST_ODD have outputs that are no numbers, UserError for an
    image without a label, DataError for one that is no class.
    """
    size, mean, std, batch_size, workers, _ = preparation
    blanks, named, odd = Blanks(store), 0, 0
    batches = central_views(
        blanks, device, size=size, mean=mean, std=std, batch_size=batch_size, workers=workers, max_failed_fraction=0.0,
        labels=True, each_batch=each_batch,
    )  # fmt: skip
    with full_precision():
        for batch, views in batches:
            out_BF = network(views).float()
            # One row with something that is no number would be the nearest of every query.
            odd += int((~(out_BF.abs() <= LARGEST)).any(1).sum())
            rows_BF = out_BF.nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST).cpu().numpy()
            assert batch.label_B is not None
            label_B = batch.label_B.clone()
            for place, index in enumerate(batch.index_B.tolist()):
                if (error := blanks.failed.get(index)) is not None:
                    label_B[place] = FAILED
                    named += 1
                    _tell(store.name(index), error, named)
            if named > limit:
                raise LoaderError(f"{named} images can't be read, more than --max-failed-fraction of training allows")
            check_labels(store, batch.index_B, label_B)
            if odd > MOST_ODD * store.num_samples:
                raise RunError(
                    f"more than {MOST_ODD:.0%} of the images have features that are no numbers, or too large ones: "
                    "an accuracy would say nothing"
                )
            yield rows_BF, label_B
    if odd:
        what = "features that are no numbers, which count as 0, or too large ones, which are cut off"
        warn(f"{odd} of {store.num_samples} images have {what}")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions of fp32 in here are of fp32 on a GPU, too, whose TF32 has ten bits; products of matrices are."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def extract(
    network: nn.Module, store: Store, folder: pathlib.Path, device: torch.device, preparation: Preparation,
    each_batch: Callable[[], None] = lambda: None,
) -> Features:  # fmt: skip
    """The features of a store by this process alone, on the disk of `folder`. Raises as `outputs` does, and RunError
    when the disk is too full."""
    total, done = store.num_samples, 0
    values_NF, label_N = None, torch.empty(total, dtype=torch.int64)
    limit = preparation.most_failed(total)
    with progress(total, title="features") as advance:
        for rows_BF, label_B in outputs(network, store, device, preparation, limit, each_batch):
            if values_NF is None:
                values_NF = _on_disk(folder, (total, rows_BF.shape[1]))
            at = slice(done, done + len(rows_BF))
            values_NF[at], label_N[at] = rows_BF, label_B
            done += len(rows_BF)
            advance(len(rows_BF))
    assert values_NF is not None, "a store holds one image at least"
    return readable(values_NF, label_N)


def readable(values_NF: Rows, label_N: Tensor) -> Features:
    """Of rows and labels, those of images that could be read. Raises DataError where there are none."""
    good_N = label_N != FAILED
    if not good_N.any():
        raise DataError("no image can be read")
    return Features(values_NF, label_N[good_N], good_N.nonzero()[:, 0].numpy())


def _tell(name: str, error: DataError | OSError, number: int) -> None:
    if number <= NAMED_FAILURES:
        said = reason(error) if isinstance(error, OSError) else str(error)
        more = "; more of them are only counted" if number == NAMED_FAILURES else ""
        warn(f"{name}: {said}; left out{more}")


def check_labels(store: Store, index_B: torch.Tensor, label_B: torch.Tensor) -> None:
    """Raises UserError for an image without a label, DataError for a label that is none of the classes."""
    if ((label_B < 0) & (label_B != FAILED)).any():
        raise UserError(f"the data set has {_UNLABELLED}")
    if (odd_B := label_B >= len(store.classes)).any():
        place = int(odd_B.nonzero()[0])
        raise DataError(
            f"{store.name(int(index_B[place]))}: label {int(label_B[place])}, but there are {len(store.classes)} "
            "classes: dataprep/verify.py tells whether the data set is damaged"
        )


def _on_disk(folder: pathlib.Path, shape: tuple[int, int]) -> np.memmap:
    """An array of fp32 in a file that has no name, so that none is left behind, however the process ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # A mapped file that can't grow when it is written to would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, max(1, 4 * shape[0] * shape[1]))
        except OSError as error:
            raise RunError(f"{folder}: no room for the features of {shape[0]} images: {error.strerror}") from None
        return np.memmap(file, np.float32, "r+", shape=shape)
