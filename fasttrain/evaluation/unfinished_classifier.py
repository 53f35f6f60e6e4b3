"""A classifier that is being trained: the folder from which the same command goes on after any interruption."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import time
from typing import Any

import torch
from torch import nn

from fasttrain.engine.ranks import Ranks
from fasttrain.input import Store
from fasttrain.run.checkpoint import CheckpointError, load_newest, save_checkpoint
from fasttrain.system.cli import warn
from fasttrain.system.errors import note

SAVE_SECONDS = 120.0  # between two checkpoints inside an epoch: what a kill costs
SAVE_SECONDS_BETWEEN_EPOCHS = 10.0  # epochs of a small set are shorter than saving a large encoder takes


def digest(settings: list[Any], encoder: nn.Module, train: Store) -> str:
    """SHA-256 of all that decides the classifier: settings, as JSON has them, weights, and images."""
    found = hashlib.sha256(json.dumps([settings, train.fingerprint, train.num_samples]).encode())
    for name, tensor in encoder.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Unfinished:
    """WORK/DIGEST: the newest state of exactly this classifier. The first rank alone writes there."""

    def __init__(self, work: pathlib.Path, digest: str, ranks: Ranks) -> None:
        """work: a folder that no other process uses meanwhile."""
        self._folder, self._ranks, self._saved = work / digest[:16], ranks, time.monotonic()

    def newest(self) -> dict[str, Any] | None:
        """The first rank's newest state that is whole, on every rank; None to begin with."""
        return self._ranks.share(self._ranks.together(lambda: self._load() if self._ranks.is_main else None))

    def _load(self) -> dict[str, Any] | None:
        try:
            found = load_newest(self._folder)
        except CheckpointError:
            warn(f"no state in {self._folder} can be read: the classifier is trained anew")
            shutil.rmtree(self._folder)
            return None
        if found:
            note(f"continuing {self._folder} from step {found.state['step']}")
        return found.state if found else None

    def due(self, epoch_ends: bool) -> bool:
        """On the first rank, is it time for a checkpoint?"""
        seconds = SAVE_SECONDS_BETWEEN_EPOCHS if epoch_ends else SAVE_SECONDS
        return self._ranks.is_main and time.monotonic() - self._saved >= seconds

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, with its "step", in place of the one before. Raises CheckpointError where it can't."""
        save_checkpoint(self._folder, state, keep_last=1)
        self._saved = time.monotonic()
