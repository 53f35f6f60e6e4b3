"""kNN accuracy while a run is under way: a figure that, unlike the loss, says which checkpoint is the best."""

from __future__ import annotations

import pathlib

import torch

from fasttrain.config import TrainConfig
from fasttrain.data import pixel_statistics
from fasttrain.features import extract, open_labelled
from fasttrain.knn import knn_accuracy
from fasttrain.methods import Method

MOST = 50_000  # images of a split: enough to rank checkpoints by, and other ranks need not wait for long
NEIGHBOURS, TEMPERATURE = 200, 0.1
BATCH_SIZE = 256


class KnnMonitor:
    """Classifies (at most MOST of) the val split by the train split, as evaluate.py does. Draws nothing at random."""

    def __init__(self, config: TrainConfig, device: torch.device, workers: int) -> None:
        """Raises DataError without a val split, UserError where labels are missing."""
        data = pathlib.Path(config.data)
        self._splits = open_labelled(data, config.loader, config.size, MOST)
        self._statistics = pixel_statistics(data, config.loader)
        self._size, self._device, self._workers = config.size, device, workers
        self._max_failed = config.max_failed_fraction

    def __call__(self, method: Method, folder: pathlib.Path) -> float:
        """Top-1 accuracy in percent of the encoder's features, which lie on the disk of `folder` meanwhile."""
        mean, std = self._statistics
        method.encoder.eval()
        with torch.compiler.set_stance("force_eager"):  # else every size of batch is compiled again
            memory, queries = (
                extract(
                    method.encoder, method.feature_width, part, folder, self._device, size=self._size, mean=mean,
                    std=std, batch_size=BATCH_SIZE, workers=self._workers, max_failed_fraction=self._max_failed,
                )
                for part in self._splits
            )  # fmt: skip
            classes = len(self._splits[0].classes)
            accuracy = knn_accuracy(memory, queries, classes, NEIGHBOURS, TEMPERATURE, self._device)
        method.encoder.train()
        return accuracy
