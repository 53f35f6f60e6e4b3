"""What is there to read, and a loader for it."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterable

import torch

from fasttrain.formats.beton_set import beton_files, open_betons
from fasttrain.formats.manifest import FILE_NAME, Manifest, ManifestError, check_finished
from fasttrain.input.beton_store import ShardStore, StockStore
from fasttrain.input.folder_store import FolderStore, list_images
from fasttrain.input.loader import MAX_FAILED_FRACTION, Loader, ThreadLoader
from fasttrain.input.order import Order
from fasttrain.input.places import Place, located
from fasttrain.input.prefetch import prefetched
from fasttrain.input.stores import Store, tell_once
from fasttrain.input.tar_store import TarStore
from fasttrain.storage.near import Folder
from fasttrain.system.errors import UserError

MOST_TRIED = 1000  # shards that are looked at before a run begins; a larger set's others are when they are needed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dataset(
    data: str | os.PathLike[str] | Place, split: str = "train", loader: str = "auto", view_size: int = 0,
    val_fraction: float = 0.0,
) -> Store:  # fmt: skip
    """The samples of one split ("train" or "val").

    data: a path, the URL of a converted data set, or what located() returns.
    loader: "folder" (plain image files); "ffcv" (shards); others by what is there: a converted data set has a
    manifest.json, .beton files without one are stock FFCV's, anything else is plain image files.
    view_size: side of the views to be cut, in pixels: files far larger are decoded smaller; 0: never.
    val_fraction: part of each class of plain image files that is the "val" split.
    Raises DataError for a path or split that is not there, or shards that do not match their manifest; UserError for a
    val_fraction of shards, and for a URL what located() does.
    """
    place = located(data)
    kind, path = _kind(place, loader), place.path
    if kind == "folder":
        return FolderStore(path, split, view_size, val_fraction)
    if val_fraction:
        raise UserError(f"--val-fraction is for plain image files, and {place} holds shards: convert.py has it, too")
    if kind == "betons":
        return _open_betons(path, split)
    manifest = _manifest(path)
    if not manifest.splits.get(split):
        raise ManifestError(f"{place} has no {split!r} split (a source with val/, or convert with --val-fraction)")
    store = (TarStore if manifest.format == "webdataset" else ShardStore).of(place.near, manifest, split)
    if not place.url:  # which comes shard by shard, and is checked as it comes
        manifest.check_shards(path, MOST_TRIED)
        store.try_shards(MOST_TRIED)
    return store


def split_names(data: str | os.PathLike[str] | Place, loader: str = "auto") -> tuple[str, ...]:
    """The splits of a data set, "train" first. data, loader: as for open_dataset. Raises DataError as that does."""
    place = located(data)
    kind, path = _kind(place, loader), place.path
    if kind == "folder":
        found: Iterable[str] = list_images(path).splits
    elif kind == "betons":
        found = open_betons(path).splits
    else:
        found = (split for split, shards in _manifest(path).splits.items() if shards)
    return tuple(sorted(found, key=lambda split: split != "train"))


def _manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a folder, which a start asks for several times, and a large set's takes seconds to read."""
    try:
        status = (folder / FILE_NAME).stat()
    except OSError:  # loading it says why
        return Manifest.load(folder)
    return _loaded(folder, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(2)
def _loaded(folder: pathlib.Path, *_unchanged: int) -> Manifest:
    return Manifest.load(folder)


def _kind(place: Place, loader: str) -> str:
    """What lies there: "folder", "betons" or "manifest". Raises ManifestError where that can't be read as it is."""
    path = place.path
    if place.url and loader == "folder":
        raise ManifestError(f"{place}: --loader folder is for images on this machine; elsewhere they lie in shards")
    if not path.exists():
        raise ManifestError(f"{path}: no such folder")
    if loader == "folder" and path.is_dir():
        return "folder"
    if (path / FILE_NAME).exists():
        return "manifest"
    check_finished(path)
    if beton_files(path):
        return "betons"
    if not path.is_dir():
        raise ManifestError(f"{path}: a file: convert it first, by dataprep/convert.py")
    return "manifest" if loader == "ffcv" else "folder"


def _open_betons(path: pathlib.Path, split: str) -> Store:
    found = open_betons(path)
    if split not in found.splits:
        raise ManifestError(f"{path} has no {split!r} split: it takes a folder with train.beton and val.beton")
    tell_once(str(path), (*([str(found.unused)] if found.unused.count else []), *found.notes))
    return StockStore(Folder(path if path.is_dir() else path.parent), found, split)


def open_loader(
    store: Store, order: Order, workers: int, loader: str = "auto", device: torch.device | None = None,
    max_failed_fraction: float = MAX_FAILED_FRACTION, labels: bool = False, needs_labels: bool = False,
) -> Loader:  # fmt: skip
    """The samples of a store in an order: decoded ahead by `workers` threads, by "dali", or once for all ("resident").

    device: where Batch.pixels lies; None is host memory. labels: read them, too. needs_labels: a sample without one
    counts as one that can't be decoded. Raises UserError where DALI is missing or memory does not suffice, LoaderError
    where "resident" meets too many samples that can't be decoded.
    """
    device = device or torch.device("cpu")
    if loader == "resident":
        from fasttrain.input.resident import ResidentLoader

        return ResidentLoader(store, order, workers, device, max_failed_fraction, labels, needs_labels)
    if loader == "dali":
        from fasttrain.input.dali import DaliLoader

        return DaliLoader(store, order, workers, device, max_failed_fraction, labels, needs_labels)
    pinned = device.type == "cuda"
    return prefetched(ThreadLoader(store, order, workers, max_failed_fraction, labels, pinned, needs_labels), device)


def pixel_statistics(data: str | os.PathLike[str] | Place, loader: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels in [0, 1]: the manifest's, or ImageNet's where there is none.

    data: as for open_dataset.
    A channel that is the same everywhere, whose deviation is 0, has 1: views are divided by it.
    """
    path = located(data).path
    if loader == "folder" or not (path / FILE_NAME).exists():
        return IMAGENET_MEAN, IMAGENET_STD
    manifest = _manifest(path)
    return tuple(map(float, manifest.pixel_mean)), tuple(float(std) or 1.0 for std in manifest.pixel_std)
