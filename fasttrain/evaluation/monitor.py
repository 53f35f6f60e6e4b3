"""kNN accuracy while a run is under way: a figure that, unlike the loss, says which checkpoint is the best."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import torch
from torch import nn

from fasttrain.evaluation.accuracy import Accuracy, accuracy
from fasttrain.evaluation.features import Preparation, extract, open_labelled
from fasttrain.evaluation.knn import knn
from fasttrain.evaluation.options import TEMPERATURE
from fasttrain.evaluation.ranking import ALONE
from fasttrain.evaluation.watched import Watched
from fasttrain.input import Place
from fasttrain.input.options import DataOptions
from fasttrain.methods import Method
from fasttrain.run.checkpoint import keep_best
from fasttrain.system.errors import DataError, RunError, UserError

MOST = 50_000  # images of a split: enough to rank checkpoints by, and other ranks need not wait for long
BATCH_SIZE = 256


class KnnMonitor:
    """Classifies (at most MOST of) the val split by the train split, as evaluate.py does. Draws nothing at random."""

    def __init__(
        self, place: Place, options: DataOptions, k: int, size: int, device: torch.device, workers: int
    ) -> None:
        """place: of options.data. k: neighbours, 0: as `neighbours` says. size: side of the views.

        Raises DataError without a val split, UserError where labels are missing.
        """
        self._splits = open_labelled(place, options.loader, size, MOST, options.val_fraction)
        self._k, self._size, self._device, self._workers = k, size, device, workers
        self._max_failed = options.max_failed_fraction

    def __call__(
        self, method: Method, mean: tuple, std: tuple, folder: pathlib.Path, each_batch: Callable[[], None]
    ) -> Accuracy:
        """Accuracy of the encoder's features, which lie on the disk of `folder` meanwhile.

        mean, std: by which views are normalised. each_batch is called before each batch and may raise to end it.
        """
        encoder, _ = method.evaluated
        encoder.eval()
        try:
            return self._accuracy(encoder, mean, std, folder, each_batch)
        finally:
            encoder.train()

    def _accuracy(
        self, encoder: nn.Module, mean: tuple, std: tuple, folder: pathlib.Path, each_batch: Callable[[], None]
    ) -> Accuracy:
        preparation = Preparation(self._size, mean, std, BATCH_SIZE, self._workers, self._max_failed)
        with torch.compiler.set_stance("force_eager"):  # else every size of batch is compiled again
            memory, queries = (
                extract(encoder, subset, folder, self._device, preparation, each_batch) for subset in self._splits
            )
            classes = len(self._splits[0].classes)
            (ranked_Nr,) = knn(memory, queries, classes, [self._k], [TEMPERATURE], self._device, ALONE).values()
            return accuracy(ranked_Nr, queries.label_N, classes)


class KnnEvents:
    """kNN every so many steps, on the first rank while the others wait; the best step's checkpoint is best.pt.

    What was measured is what metrics.jsonl tells: a step's checkpoint is saved before its evaluation, which may be cut
    short by a signal, or never begin. A run that goes on from that checkpoint makes up for it first. One that can't be
    measured is said, and training goes on.
    """

    def __init__(self, watched: Watched, knn: KnnMonitor | None, every: int) -> None:
        """knn: None for no evaluations."""
        self._watched, self._knn, self._every = watched, knn, every

    def due(self, step: int) -> bool:
        """Is a step one of those to be evaluated? (The same on all ranks.)"""
        return self._knn is not None and step > 0 and step % self._every == 0

    def __call__(self, step: int, epoch: int) -> int:
        """Evaluate a step that is due, whose checkpoint is saved, unless it has been. Returns the signal that cut it
        short, or 0.

        Every rank calls it, and all return the same.
        """
        if not self.due(step):
            return 0
        with self._watched.display.aside("evaluating"):
            return self._watched.of_first(lambda each_batch: self._evaluate(step, epoch, each_batch))

    def _evaluate(self, step: int, epoch: int, each_batch: Callable[[], None]) -> int:
        assert self._knn is not None
        watched = self._watched
        if step not in self._measured():
            began = time.monotonic()
            try:
                found = self._knn(watched.method, watched.mean, watched.std, watched.run, each_batch)
            except (UserError, RunError, DataError, OSError) as error:  # of images that training may never read
                watched.display.say(f"kNN is not measured: {error}")
                return 0
            figures = {f"knn_{name}": value for name, value in found._asdict().items() if value is not None}
            watched.metrics.event(step, epoch, time.monotonic() - began, **figures)
        measured = self._measured()
        if max(measured, key=lambda other: measured[other]) == step:  # the first, of several
            keep_best(watched.run / "checkpoints", step)
        return 0

    def _measured(self) -> dict[int, float]:
        """Accuracies by step."""
        return {entry["step"]: entry["knn_top1"] for entry in self._watched.entries() if "knn_top1" in entry}
