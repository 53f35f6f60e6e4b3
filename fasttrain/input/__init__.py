"""Loaders: decode, nothing else. open_dataset and open_loader open them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.input.batch import Batch
    from fasttrain.input.datasets import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        open_dataset,
        open_loader,
        pixel_statistics,
        split_names,
    )
    from fasttrain.input.folder_store import FolderStore
    from fasttrain.input.loader import MAX_FAILED_FRACTION, Loader, LoaderError, ThreadLoader
    from fasttrain.input.order import Order
    from fasttrain.input.places import Place, located
    from fasttrain.input.selection import Selection, evenly, seems_labelled
    from fasttrain.input.shuffle import Shuffle, choose_shuffle
    from fasttrain.input.stores import Store

_FILES = {
    "Batch": "batch", "FolderStore": "folder_store", "Loader": "loader", "LoaderError": "loader",
    "ThreadLoader": "loader", "MAX_FAILED_FRACTION": "loader", "Order": "order", "Store": "stores",
    "IMAGENET_MEAN": "datasets", "IMAGENET_STD": "datasets", "open_dataset": "datasets", "open_loader": "datasets",
    "pixel_statistics": "datasets", "split_names": "datasets", "Selection": "selection", "evenly": "selection",
    "seems_labelled": "selection", "Shuffle": "shuffle", "choose_shuffle": "shuffle", "Place": "places",
    "located": "places",
}  # fmt: skip
__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "MAX_FAILED_FRACTION", "Batch", "FolderStore", "Loader", "LoaderError", "Order",
    "Place", "Selection", "Shuffle", "Store", "ThreadLoader", "choose_shuffle", "evenly", "located", "open_dataset",
    "open_loader", "pixel_statistics", "seems_labelled", "split_names",
]  # fmt: skip


if not TYPE_CHECKING:  # with it, a checker takes any name for one of them

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        """Each of them once it is asked for: they need torch and numba, which options do not."""
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
