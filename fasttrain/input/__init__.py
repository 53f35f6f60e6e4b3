"""Loaders: decode, nothing else. open_dataset and open_loader are the doors."""

from __future__ import annotations

import pathlib

import torch

from fasttrain.formats.manifest import Manifest, ManifestError
from fasttrain.input.batch import Batch
from fasttrain.input.folder_store import FolderStore
from fasttrain.input.loader import MAX_FAILED_FRACTION, Loader, LoaderError, ThreadLoader
from fasttrain.input.order import Order
from fasttrain.input.prefetch import prefetched
from fasttrain.input.stores import ShardStore, Store
from fasttrain.input.tar_store import TarStore
from fasttrain.system.errors import UserError

__all__ = [
    "Batch", "FolderStore", "Loader", "LoaderError", "Order", "Store", "ThreadLoader", "open_dataset", "open_loader",
    "pixel_statistics",
]  # fmt: skip

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dataset(
    path: pathlib.Path, split: str, loader: str = "auto", view_size: int = 0, val_fraction: float = 0.0
) -> Store:
    """The samples of one split ("train" or "val").

    loader: "folder" (plain image files); "ffcv" (a converted data set of either format); others by whether there is a
    manifest.json. view_size: side of the views to be cut, in pixels: files far larger are decoded smaller; 0: never.
    val_fraction: part of each class of plain image files that is the "val" split.
    Raises DataError for a path or split that is not there, or shards that do not match their manifest; UserError for a
    val_fraction of shards.
    """
    if not path.is_dir():
        found = "a file: convert it first, by dataprep/convert.py" if path.exists() else "no such folder"
        raise ManifestError(f"{path}: {found}")
    if loader == "folder" or (loader != "ffcv" and not (path / "manifest.json").exists()):
        return FolderStore(path, split, view_size, val_fraction)
    if val_fraction:
        raise UserError(f"--val-fraction is for plain image files, and {path} is converted: convert.py has it, too")
    manifest = Manifest.load(path)
    if not manifest.splits.get(split):
        raise ManifestError(f"{path} has no {split!r} split (a source with val/, or convert with --val-fraction)")
    manifest.check_shards(path)
    return (TarStore if manifest.format == "webdataset" else ShardStore)(path, manifest, split)


def open_loader(
    store: Store, order: Order, workers: int, loader: str = "auto", device: torch.device | None = None,
    max_failed_fraction: float = MAX_FAILED_FRACTION, labels: bool = False,
) -> Loader:  # fmt: skip
    """The samples of a store in an order: decoded ahead by `workers` threads, by "dali", or once for all ("resident").

    device: where Batch.pixels lies; None is host memory. labels: read them, too. Raises UserError where DALI is missing
    or memory does not suffice, LoaderError where "resident" meets too many samples that can't be decoded.
    """
    device = device or torch.device("cpu")
    if loader == "resident":
        from fasttrain.input.resident import ResidentLoader

        return ResidentLoader(store, order, workers, device, max_failed_fraction, labels)
    if loader == "dali":
        from fasttrain.input.dali import DaliLoader

        return DaliLoader(store, order, workers, device, max_failed_fraction, labels)
    return prefetched(ThreadLoader(store, order, workers, max_failed_fraction, labels, device.type == "cuda"), device)


def pixel_statistics(path: pathlib.Path, loader: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels in [0, 1]: the manifest's, or ImageNet's for plain files."""
    if loader == "folder" or not (path / "manifest.json").exists():
        return IMAGENET_MEAN, IMAGENET_STD
    manifest = Manifest.load(path)
    return tuple(manifest.pixel_mean), tuple(manifest.pixel_std)
