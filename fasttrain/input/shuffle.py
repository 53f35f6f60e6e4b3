"""How the samples of a store are shuffled: all of them, or those of some shards at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fasttrain.input.places import Place
from fasttrain.input.stores import BlockStore, Store
from fasttrain.system.errors import UserError
from fasttrain.system.memory import machine_memory
from fasttrain.system.mounts import network_file_system

TIMES_MEMORY = 4  # data of as many times the machine's memory is hardly ever in it when it is needed


class Shuffle(NamedTuple):
    """lanes and block_S: as of an Order. reason: a line on what "auto" chose other than "global", and why; or ""."""

    lanes: int
    block_S: np.ndarray | None
    reason: str = ""


def choose_shuffle(store: Store, place: Place | None, kind: str, window: int) -> Shuffle:
    """kind: "auto", "global" or "block", of `window` shards. place: of the data; None: unknown.

    Raises UserError for "block" where there are no shards.
    """
    if not isinstance(store, BlockStore):
        if kind == "block":
            raise UserError(f"--shuffle block is for shards, and {place or 'this set'} has none: convert it first")
        return Shuffle(0, None)
    lanes = min(window, len(store.block_S) - 1)
    if kind != "auto":
        return Shuffle(lanes if kind == "block" else 0, store.block_S)
    if why := _why_blocks(store, place):
        return Shuffle(lanes, store.block_S, f"--shuffle block, {lanes} shards at once: {why}")
    return Shuffle(0, store.block_S)


def _why_blocks(store: BlockStore, place: Place | None) -> str:
    if place and place.url:
        return f"{place} is read from {place.url.partition(':')[0]}"
    if place and (kind := network_file_system(place.path)):
        return f"{place} is on a file system of the network ({kind})"
    memory = machine_memory()
    if store.num_bytes > TIMES_MEMORY * memory:
        return f"the shards have {store.num_bytes / 2**30:.0f} GiB, the machine {memory / 2**30:.0f} GiB of memory"
    return ""
