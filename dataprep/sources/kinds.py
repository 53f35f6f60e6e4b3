"""Where images come from: folders, archives, WebDataset tars, tables, arrays; each a `Source` in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from fasttrain.dataprep.sources.archive import tar_source, zip_source
from fasttrain.dataprep.sources.beton import beton_source
from fasttrain.dataprep.sources.cifar import cifar_folder, cifar_source
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.dataprep.sources.npz import npz_source
from fasttrain.dataprep.sources.parquet import CACHE_BYTES, parquet_files, parquet_source
from fasttrain.dataprep.sources.source import Groups, Source
from fasttrain.dataprep.sources.webdataset import expand, looks_like_samples, webdataset_source
from fasttrain.formats.beton_set import beton_files
from fasttrain.formats.boundary import boundary
from fasttrain.formats.listing import Listing, Sample, SourceError, file_state, listing_digest

Kind = Literal["auto", "folder", "tar", "zip", "webdataset", "parquet", "cifar", "npz", "beton"]

KINDS: dict[str, Callable[[Path], Source]] = {
    "folder": scan_folder,
    "tar": tar_source,
    "zip": zip_source,
    "webdataset": webdataset_source,
    "parquet": parquet_source,
    "cifar": cifar_source,
    "npz": npz_source,
    "beton": beton_source,
}


def open_source(path: Path, kind: Kind = "auto") -> Source:
    """List the samples of a source of this kind, or of the kind that `recognise` sees.

    Raises:
        SourceError: it is missing, damaged, of another kind, or holds no images.
        UserError: a package that this kind needs is missing.
    """
    with boundary(path):
        source = KINDS[recognise(path) if kind == "auto" else kind](path)
        return replace(source, classes=tuple(map(_storable, source.classes)))


def _storable(name: str) -> str:
    """Return the name of a class without what no encoding can write; bytes of a file's name that are no text may stay.

    JSON, also that in a table, may hold halves of characters.
    """
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace").decode()
    return name


def recognise(path: Path) -> str:
    """Return the kind of a source by the names, and for a tar by its first members. Raises SourceError, OSError."""
    if path.is_dir():
        if cifar_folder(path):
            return "cifar"
        if any(path.glob("*.tar")):
            return "webdataset"
        if beton_files(path):
            return "beton"
        return "parquet" if parquet_files(path) else "folder"
    if path.suffix.lower() == ".tar" and path.is_file():
        return "webdataset" if looks_like_samples(str(path)) else "tar"
    if not path.exists():
        if expand(str(path)) == [str(path)]:
            raise SourceError(f"{path}: no such folder or file")
        return "webdataset"
    if beton_files(path):
        return "beton"
    kind = {".zip": "zip", ".npz": "npz", ".parquet": "parquet"}.get(path.suffix.lower())
    if kind is None:
        raise SourceError(
            f"{path}: not a folder, .tar, .zip, .parquet, .npz or .beton (--kind names it; decompress .tar.gz)"
        )
    return kind


def fingerprint(source: Source, times: bool = False) -> str:
    """Return the SHA-256 (hex) of every sample's split, path, label and size or place; with times, also of mtimes.

    Without times a copy of the source has the fingerprint of the source.
    """

    def state(sample: Sample) -> object:
        return sample.place if source.files else file_state(os.path.join(source.root, sample.path), times)

    files = [(os.path.basename(file), file_state(file, times)) for file in source.files]
    return listing_digest(source.classes, source.splits, state, files)


def shuffled_splits(source: Source, val_fraction: float, seed: int) -> dict[str, Listing]:
    """Shuffle each split; with val_fraction, set apart that part of every class as "val" (rounded to whole images).

    Samples that are read in groups are shuffled within windows of shuffled groups that fit a process's cache.
    Raises SourceError if the source has a val split already, or the fraction leaves a split without images.
    """
    splits = {split: _shuffled(samples, seed, source.groups.get(split)) for split, samples in source.splits.items()}
    if not val_fraction:
        return splits
    if "val" in splits:
        raise SourceError(f"{source.root} has a validation split already, so none can be set apart")
    chosen_N = _first_of_each(splits["train"].label_N, val_fraction)
    parts = {"train": splits["train"].take(np.flatnonzero(~chosen_N)),
             "val": splits["train"].take(np.flatnonzero(chosen_N))}  # fmt: skip
    for split, samples in parts.items():
        if not samples:
            raise SourceError(
                f"{source.root}: setting apart {val_fraction} of each class, rounded to whole images,"
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


def _shuffled(samples: Listing, seed: int, groups: Groups | None) -> Listing:
    """Return the samples in a seeded order: that of a Philox stream's numbers, which no version of NumPy changes."""
    key_N = np.random.Philox(key=seed).random_raw(len(samples))
    if groups is None:
        return samples.take(np.argsort(key_N, kind="stable"))
    order_G = np.argsort(np.random.Philox(key=seed).random_raw(len(groups.bytes_G)), kind="stable")
    window_G = np.empty(len(order_G), np.int64)
    window_G[order_G] = np.cumsum(groups.bytes_G[order_G]) // (CACHE_BYTES // 2)
    return samples.take(np.lexsort((key_N, window_G[groups.group_N])))
