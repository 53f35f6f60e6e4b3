"""The options of the input."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from fasttrain.system.options import Bounds, Fraction, Free, Options, Positive, With

WINDOW = 64  # shards that are mixed at a time


@dataclass(frozen=True)
class CacheOptions(Options):
    """Where shards come to, of a data set elsewhere."""

    cache: Free[str] = ""
    """Folder on a disk of this machine for the shards of a data set elsewhere, shared by all runs on it. Empty:
    for a command on a run, that of the run if it is there; else fasttrain/shards in $XDG_CACHE_HOME, or in ~/.cache."""
    cache_gb: Free[Positive[float]] = 100.0
    """Gigabytes that they may take there; the least recently used go first. What is free on the disk bounds them,
    too."""

    def after(self, training: CacheOptions) -> CacheOptions:
        """What a command on a run takes: the run's own where nothing else is typed and its folder is on this machine.
        A smaller bound on the same folder would remove what a training there has fetched."""
        if self.cache not in ("", training.cache) or not os.path.isdir(training.cache):
            return self
        return training if self.cache_gb == CacheOptions.cache_gb else replace(training, cache_gb=self.cache_gb)


@dataclass(frozen=True)
class DataOptions(Options):
    """What is read, and how."""

    data: Free[str]
    """Converted data set (a folder with manifest.json), FFCV's .beton file or a folder of train.beton and val.beton, or
    a folder of image files; or the URL of a converted one (s3://…, gs://…, https://…)."""
    loader: Free[Literal["auto", "ffcv", "dali", "folder", "resident"]] = "auto"
    """auto decodes shards or plain image files, whichever --data is; ffcv insists on shards, folder on plain files;
    dali decodes shards by NVIDIA DALI; resident decodes either once and keeps all of it in memory."""
    val_fraction: Free[Annotated[float, Bounds(0, 0.99)]] = 0.0
    """Fraction of each class of plain image files to keep from training, for kNN and evaluation: the images that
    convert.py --val-fraction sets apart with its default --seed. Shards are converted with one."""
    shuffle: Literal["auto", "global", "block"] = "auto"
    """global: any image may come at any step, so storage reads them one by one. block: --shuffle-window shards are read
    at once, each in sequence, and a batch has as many images of each; auto takes it for shards elsewhere, on a file
    system of the network, or of several times the machine's memory."""
    shuffle_window: Annotated[int, Bounds(1, 1 << 16), With("shuffle", ("auto", "block"))] = WINDOW
    """Shards that --shuffle block mixes at a time."""
    max_failed_fraction: Free[Fraction[float]] = 0.01
    """Training stops when more than this part of the images (and more than 10) can't be decoded."""
    elsewhere: CacheOptions = field(default_factory=CacheOptions)
    """Data sets behind a URL"""
