"""Loaders: decode, nothing else. open_dataset is the door."""

from __future__ import annotations

import pathlib

from dataprep.manifest import Manifest, ManifestError
from fasttrain.data.batch import Batch
from fasttrain.data.loader import LoaderError, ThreadLoader
from fasttrain.data.order import Order
from fasttrain.data.stores import FolderStore, ShardStore, Store

__all__ = [
    "Batch", "LoaderError", "Order", "Store", "ThreadLoader", "open_dataset",
    "pixel_statistics",
]  # fmt: skip

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dataset(path: pathlib.Path, split: str, loader: str = "auto") -> Store:
    """The samples of one split ("train" or "val").

    loader: "ffcv" (a converted data set), "folder" (plain image files), or "auto" by whether there is a manifest.json.
    Raises DataError for a path or split that is not there, or shards that do not match their manifest.
    """
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder")
    if loader == "folder" or (loader == "auto" and not (path / "manifest.json").exists()):
        return FolderStore(path, split)
    manifest = Manifest.load(path)
    if not manifest.splits.get(split):
        raise ManifestError(f"{path} has no {split!r} split (a source with val/, or convert with --val-fraction)")
    manifest.check_shards(path)
    return ShardStore(path, manifest, split)


def pixel_statistics(path: pathlib.Path, loader: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels in [0, 1]: the manifest's, or ImageNet's for plain files."""
    if loader == "folder" or not (path / "manifest.json").exists():
        return IMAGENET_MEAN, IMAGENET_STD
    manifest = Manifest.load(path)
    return tuple(manifest.pixel_mean), tuple(manifest.pixel_std)
