"""Features of a split by all ranks, kept on the disk part by part: what is finished survives a kill."""

from __future__ import annotations

import pathlib
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.features import FAILED, Features, Preparation, outputs, readable
from fasttrain.input import LoaderError, Selection, Store
from fasttrain.system.cli import warn
from fasttrain.system.durable import replace_file
from fasttrain.system.progress import progress

BATCHES = 16  # of a part, at least
MOST_PARTS = 256  # of a split: each is an open file while it is read, and a process may often have no more than 1024


class Parts:
    """fp32 rows (N, F) in several files, all but the last of which hold as many of them."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts, self._each = parts, len(parts[0])
        self.shape = sum(map(len, parts)), parts[0].shape[1]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self.shape[0]))
        out_NF = np.empty((len(index), self.shape[1]), np.float32)
        part_N = index // self._each
        for part in np.unique(part_N):
            here_N = part_N == part
            out_NF[here_N] = self._parts[part][index[here_N] - part * self._each]
        return out_NF


def extract_on_all(
    network: nn.Module, store: Store, folder: pathlib.Path, ranks: Ranks, preparation: Preparation
) -> Features:
    """The features of a store, as `extract` gives them, in `folder`, which all ranks share.

    Every rank does its share of the parts that are not there yet. A part follows from the store and the network alone,
    whichever rank does it. Raises as `outputs` does.
    """
    each = preparation.batch_size * max(BATCHES, -(-store.num_samples // (preparation.batch_size * MOST_PARTS)))
    parts = -(-store.num_samples // each)
    limit = preparation.most_failed(store.num_samples)

    def share() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        left = [part for part in range(ranks.rank, parts, ranks.world_size) if not _is_there(folder, part)]
        if left:
            index_N = np.concatenate([np.arange(part * each, (part + 1) * each) for part in left])
            mine = Selection(store, index_N[index_N < store.num_samples])
            _fill(network, mine, folder, left, each, ranks, preparation, limit)

    ranks.together(share)
    label_N = torch.cat([torch.from_numpy(np.load(_labels(folder, part))) for part in range(parts)])
    failed = int((label_N == FAILED).sum())
    if failed > limit:
        raise LoaderError(f"{failed} images can't be read, more than --max-failed-fraction of training allows")
    if failed and ranks.is_main:
        warn(f"{failed} of {store.num_samples} images can't be read and are left out")
    return readable(Parts([np.load(_values(folder, part), mmap_mode="r") for part in range(parts)]), label_N)


def _fill(
    network: nn.Module, mine: Selection, folder: pathlib.Path, left: list[int], each: int, ranks: Ranks,
    preparation: Preparation, limit: int,
) -> None:  # fmt: skip
    """Write the parts that are left, whose samples `mine` holds one after the other."""
    rows: list[np.ndarray] = []
    labels: list[Tensor] = []
    todo, done = iter(left), 0
    with progress(mine.num_samples, title="features", quiet=not ranks.is_main) as advance:
        for rows_BF, label_B in outputs(network, mine, ranks.device, preparation, limit):
            rows.append(rows_BF)
            labels.append(label_B)
            done += len(label_B)
            advance(len(label_B))
            if done % each == 0 or done == mine.num_samples:
                part, whole_NF, label_N = next(todo), np.concatenate(rows), torch.cat(labels).numpy()
                _save(_labels(folder, part), label_N)
                _save(_values(folder, part), whole_NF)
                rows, labels = [], []


def _is_there(folder: pathlib.Path, part: int) -> bool:
    """Are both files? One alone is what a kill leaves, while they are written or removed."""
    return _values(folder, part).exists() and _labels(folder, part).exists()


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    def write(file: BinaryIO) -> None:  # np.save would not say what is wrong with the disk
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)

    replace_file(path, write)


def _values(folder: pathlib.Path, part: int) -> pathlib.Path:
    return folder / f"{part:06d}.npy"


def _labels(folder: pathlib.Path, part: int) -> pathlib.Path:
    return folder / f"{part:06d}.labels.npy"
