"""Frozen features of a whole split, in a file while they are used: memory does not grow with the data set."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fasttrain.input import Batch, Order, Store, open_dataset, open_loader
from fasttrain.input.stores import Encoded
from fasttrain.kernels.augment import augment
from fasttrain.system.cli import warn
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.system.progress import progress
from fasttrain.views.draw import center, crop_fraction

LABELS_TRIED = 20  # of each split, before anything is computed
_UNLABELLED = "images without labels; kNN and the linear probe need a class folder for each"


@dataclass
class Features:
    """values_NF: float16 rows in a mapped file without a name, which goes with them; label_N: int64."""

    values_NF: np.memmap
    label_N: torch.Tensor

    def rows(self, index: slice | np.ndarray, device: torch.device) -> torch.Tensor:
        """Rows in fp32 on a device."""
        return torch.from_numpy(np.ascontiguousarray(self.values_NF[index])).to(device).float()


class EvenSubset:
    """Evenly spaced samples of a store, `most` at most: all classes of sorted files are among them in proportion."""

    def __init__(self, store: Store, most: int) -> None:
        self.num_samples = min(most, store.num_samples)
        self.classes, self.fingerprint = store.classes, store.fingerprint
        self.write = store.write
        self._store, self._index = store, np.linspace(0, store.num_samples - 1, self.num_samples).astype(np.int64)

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._store.labels(self._index[index_N])

    def read(self, index: int) -> Encoded:
        return self._store.read(int(self._index[index]))

    def name(self, index: int) -> str:
        return self._store.name(int(self._index[index]))

    def place(self, index: int) -> str:
        return self._store.place(int(self._index[index]))

    def source_name(self, index: int) -> str:
        return self._store.source_name(int(self._index[index]))


def open_labelled(
    path: pathlib.Path, loader: str, view_size: int, most: int = sys.maxsize, val_fraction: float = 0.0
) -> tuple[EvenSubset, EvenSubset]:
    """The train and val splits, `most` samples of each. Raises UserError where labels are missing.

    val_fraction: as for open_dataset.
    A set without labels is known at once by a few; any other label is read with its image.
    """
    train, val = (
        EvenSubset(open_dataset(path, split, loader, view_size, val_fraction), most) for split in ("train", "val")
    )
    if not train.classes or not all(seems_labelled(subset) for subset in (train, val)):
        raise UserError(f"{path} has {_UNLABELLED}")
    return train, val


def seems_labelled(store: Store) -> bool:
    """Whether a few of its images have a label."""
    few = EvenSubset(store, LABELS_TRIED)
    for index in range(few.num_samples):
        with contextlib.suppress(DataError, OSError):  # damage says nothing about the others
            if few.labels(np.array([index]))[0] < 0:
                return False
    return True


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
    order = Order(store.num_samples, batch_size, shuffle=False)
    loader = open_loader(store, order, workers, device=device, max_failed_fraction=max_failed_fraction, labels=labels)
    loader.load_state_dict({"epoch": 0, "step": first})
    with contextlib.closing(loader):
        for batch in loader.epoch(0):
            each_batch()
            table = center(batch.height_B, batch.width_B, crop_fraction(size))
            (group,) = augment(batch.pixels, batch.offset_B, batch.height_B, batch.width_B, table, (size,), mean, std)
            yield batch, group[0]


@torch.no_grad()
def extract(
    network: nn.Module, store: Store, folder: pathlib.Path, device: torch.device,
    *, size: int, mean: tuple, std: tuple, batch_size: int, workers: int, max_failed_fraction: float,
    each_batch: Callable[[], None] = lambda: None,
) -> Features:  # fmt: skip
    """Run `network` (N, 3, size, size) → (N, F), in evaluation mode, over the central crop of every image.

    The features lie on the disk of `folder`. each_batch is called before each batch and may raise to end it. Raises
    LoaderError when more than max_failed_fraction of the images or labels can't be read, UserError for an image without
    a label, DataError for one that is no class, RunError when the disk is too full.
    """
    values_NF, odd, done = None, 0, 0
    label_N = torch.empty(store.num_samples, dtype=torch.int64)
    limit = torch.finfo(torch.float16).max
    with progress(store.num_samples, title="features") as advance:
        for batch, views in central_views(
            store, device, size=size, mean=mean, std=std, batch_size=batch_size, workers=workers,
            max_failed_fraction=max_failed_fraction, labels=True, each_batch=each_batch,
        ):  # fmt: skip
            with torch.autocast(device.type, torch.bfloat16):
                out_BF = network(views).float()
            if values_NF is None:
                values_NF = _on_disk(folder, (store.num_samples, out_BF.shape[1]))
            rows = slice(done, done + len(batch))
            odd += int((~(out_BF.abs() <= limit)).any(1).sum())
            # One row with something that is no number would be the nearest of every query.
            values_NF[rows] = out_BF.nan_to_num(0.0).clamp(-limit, limit).half().cpu().numpy()
            assert batch.label_B is not None
            label_N[rows] = batch.label_B
            _check_labels(store, batch.index_B, batch.label_B)
            done += len(batch)
            advance(len(batch))
    assert values_NF is not None, "a store holds one image at least"
    if odd:
        what = "features that are no numbers, which count as 0, or too large ones, which are cut off"
        warn(f"{odd} of {store.num_samples} images have {what}")
    return Features(values_NF, label_N)


def _check_labels(store: Store, index_B: torch.Tensor, label_B: torch.Tensor) -> None:
    """Raises UserError for an image without a label, DataError for a label that is none of the classes."""
    if (label_B < 0).any():
        raise UserError(f"the data set has {_UNLABELLED}")
    if (odd_B := label_B >= len(store.classes)).any():
        place = int(odd_B.nonzero()[0])
        raise DataError(
            f"{store.name(int(index_B[place]))}: label {int(label_B[place])}, but there are {len(store.classes)} "
            "classes: dataprep/verify.py tells whether the data set is damaged"
        )


def _on_disk(folder: pathlib.Path, shape: tuple[int, int]) -> np.memmap:
    """An array of float16 in a file that has no name, so that none is left behind, however the process ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # A mapped file that can't grow when it is written to would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, max(1, 2 * shape[0] * shape[1]))
        except OSError as error:
            raise RunError(f"{folder}: no room for the features of {shape[0]} images: {error.strerror}") from None
        return np.memmap(file, np.float16, "r+", shape=shape)
