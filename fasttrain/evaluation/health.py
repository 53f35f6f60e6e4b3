"""The health of a representation while it is trained: figures of a few fixed images, of which most need no labels.

All of it is a function of the weights: images and views are the same every time, and nothing is drawn from torch's
state. Networks are in evaluation mode, in fp32, and as they were afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.engine.probe import OnlineProbe
from fasttrain.evaluation import label_free
from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.features import Features, full_precision
from fasttrain.evaluation.knn import knn
from fasttrain.evaluation.options import TEMPERATURE
from fasttrain.evaluation.ranking import ALONE, best_classes
from fasttrain.input import (
    Batch,
    Order,
    Place,
    Selection,
    Store,
    evenly,
    open_dataset,
    open_loader,
    seems_labelled,
    split_names,
)  # fmt: skip
from fasttrain.input.options import DataOptions
from fasttrain.kernels.augment import augment
from fasttrain.methods import Method
from fasttrain.run.metrics import HISTOGRAM
from fasttrain.system.errors import DataError, note
from fasttrain.views.draw import center, crop_fraction, draw
from fasttrain.views.spec import Recipe, expanded

BATCH_SIZE = 128
PAIRED, FEW = 4, 32  # every so manieth image of train also has two views; of FEW or less each
LIDAR_VIEWS = 8
BINS = 64  # of a histogram of cosines, equal ones from -1 to 1
EPOCH = 2**32 - 1  # whose views these are: of no training

Figures = dict[str, float | list[int]]


class HealthMonitor:
    """Figures by name, of at most `most` images of each split.

    rankme, effective_rank, alpha_req, feature_std: of the encoder's output of central crops.
    std, alignment, uniformity, histogram_positive, histogram_negative: of the directions of the projector's output of
    two views by the method's recipe; positives are the views of one image, negatives those of two. projection_std: of
    that output as it is. Of more views: lidar of the encoder's output, compactness and compactness_low of the
    projector's. With labels and a val split subset_knn_top1, subset_knn_majority and probe_top1, in percent.
    """

    def __init__(
        self, place: Place, options: DataOptions, recipe: Recipe, size: int, seed: int, most: int, lidar: bool,
        device: torch.device, workers: int,
    ) -> None:  # fmt: skip
        """place: of options.data. recipe: of the run; small crops in it are left out. size: side of the views."""

        def subset(split: str) -> Selection:
            return evenly(open_dataset(place, split, options.loader, size, options.val_fraction), most)

        self._train, self._val = subset("train"), None
        if self._train.classes and ("val" in split_names(place, options.loader) or options.val_fraction):
            try:
                val = subset("val")
                self._val = val if seems_labelled(self._train) and seems_labelled(val) else None
            except DataError as error:  # which training itself has no need of
                note(f"no accuracy is measured while training: {error}")
        self._paired = PAIRED if self._train.num_samples > FEW else 1
        full = [spec for spec in expanded(recipe) if spec.size == 1]
        self._recipe: Recipe = tuple(full * LIDAR_VIEWS)[: LIDAR_VIEWS if lidar else 2]
        self._size, self._seed, self._lidar, self._device, self._workers = size, seed, lidar, device, workers
        self._max_failed = options.max_failed_fraction

    @property
    def is_labelled(self) -> bool:
        """Are accuracies among the figures?"""
        return self._val is not None

    @torch.no_grad()
    def __call__(
        self, method: Method, probe: OnlineProbe | None, mean: tuple, std: tuple, each_batch: Callable[[], None]
    ) -> Figures:
        """mean, std: by which views are normalised. each_batch is called before each batch and may raise to end it."""
        encoder, projector = method.evaluated
        encoder.eval(), projector.eval()
        try:
            # eager: else every size of batch is compiled again
            with torch.compiler.set_stance("force_eager"), full_precision():
                return self._figures(encoder, projector, probe, mean, std, each_batch)
        finally:
            encoder.train(), projector.train()

    def _figures(
        self, encoder: nn.Module, projector: nn.Module, probe: OnlineProbe | None, mean: tuple, std: tuple,
        each_batch: Callable[[], None],
    ) -> Figures:  # fmt: skip
        features, view_features, labels = [], [], []
        for batch in self._batches(self._train, each_batch):
            features.append(encoder(self._central(batch, mean, std)).float())
            views = self._views(batch, mean, std)
            view_features.append(encoder(views.flatten(0, 1)).float().unflatten(0, views.shape[:2]))
            if batch.label_B is not None:
                labels.append(batch.label_B)
        feature_NF, feature_VPF = torch.cat(features), torch.cat(view_features, 1)
        projected = [projector(feature_PF).float() for feature_PF in feature_VPF]
        figures = spectral(feature_NF) | of_pairs(*projected[:2])
        if self._lidar:
            figures["lidar"] = float(label_free.lidar(feature_VPF.transpose(0, 1)))
            worst = label_free.compactness(torch.stack(projected, 1))
            figures |= {"compactness": float(worst.mean), "compactness_low": float(worst.low)}
        if self._val:
            memory = _in_memory(feature_NF, torch.cat(labels))
            figures |= self._supervised(encoder, memory, probe, mean, std, each_batch)
        return figures

    def _supervised(
        self, encoder: nn.Module, memory: Features, probe: OnlineProbe | None, mean: tuple, std: tuple,
        each_batch: Callable[[], None],
    ) -> Figures:  # fmt: skip
        assert self._val
        rows = [
            (encoder(self._central(batch, mean, std)).float(), batch.label_B)
            for batch in self._batches(self._val, each_batch)
        ]
        feature_NF, label_N = (torch.cat(each) for each in zip(*rows, strict=True))
        queries, classes = _in_memory(feature_NF, label_N), len(self._val.classes)
        if not len(memory) or not len(queries):
            return {}
        (ranked_Nr,) = knn(memory, queries, classes, [0], [TEMPERATURE], self._device, ALONE).values()
        found = accuracy(ranked_Nr, queries.label_N, classes)
        figures: Figures = {"subset_knn_top1": found.top1, "subset_knn_majority": found.majority}
        if probe and probe.has_learned:
            rows_MF = queries.rows(slice(None), self._device)
            figures["probe_top1"] = accuracy(best_classes(probe.scores(rows_MF)), queries.label_N, classes).top1
        return figures

    def _batches(self, store: Store, each_batch: Callable[[], None]) -> Iterator[Batch]:
        order = Order(store.num_samples, BATCH_SIZE, shuffle=False)
        loader = open_loader(
            store, order, self._workers, device=self._device, max_failed_fraction=self._max_failed,
            labels=self.is_labelled,
        )  # fmt: skip
        with contextlib.closing(loader):
            for batch in loader.epoch(0):
                each_batch()
                yield batch

    def _central(self, batch: Batch, mean: tuple, std: tuple) -> Tensor:
        """(B, 3, S, S)."""
        table = center(batch.height_B, batch.width_B, crop_fraction(self._size))
        of = batch.pixels, batch.offset_B, batch.height_B, batch.width_B
        return augment(*of, table, (self._size,), mean, std)[0][0]

    def _views(self, batch: Batch, mean: tuple, std: tuple) -> Tensor:
        """(V, P, 3, S, S): of P images at the same places of the subset, whatever the batches."""
        of = batch.offset_B, batch.height_B, batch.width_B, batch.index_B
        offset_P, height_P, width_P, index_P = (each_B[:: self._paired].contiguous() for each_B in of)
        table = draw(self._recipe, height_P, width_P, index_P, self._seed, EPOCH, self._size)
        sides = (self._size,) * len(self._recipe)
        return augment(batch.pixels, offset_P, height_P, width_P, table, sides, mean, std)[0]


def spectral(feature_NF: Tensor) -> Figures:
    """Of the encoder's features; without alpha_req where there are too few dimensions or images for it."""
    spectrum = label_free.spectrum(feature_NF)
    figures: Figures = {
        "rankme": float(label_free.rank_me(spectrum)),
        "effective_rank": float(label_free.effective_rank(spectrum)),
        "feature_std": float(label_free.standard_deviation(feature_NF)),
    }
    alpha = float(label_free.alpha_req(spectrum).alpha)
    return figures if math.isnan(alpha) else figures | {"alpha_req": alpha}


def of_pairs(x_PD: Tensor, y_PD: Tensor) -> Figures:
    """Of the projections of two views, row i of both of one image."""
    cosine_PP = F.normalize(x_PD, dim=1) @ F.normalize(y_PD, dim=1).T
    apart_PP = ~torch.eye(len(x_PD), dtype=torch.bool, device=x_PD.device)
    return {
        "std": float(label_free.standard_deviation(x_PD)),
        "projection_std": float(x_PD.std(0).mean()),
        "alignment": float(label_free.alignment(x_PD, y_PD)),
        "uniformity": float(label_free.uniformity(x_PD)),
        f"{HISTOGRAM}positive": _histogram(cosine_PP.diagonal()),
        f"{HISTOGRAM}negative": _histogram(cosine_PP[apart_PP]),
    }


def _histogram(cosine_N: Tensor) -> list[int]:
    """Counts in BINS equal bins over [-1, 1]; what is no number is in none."""
    counts = torch.histc(cosine_N.cpu().clamp(-1, 1), BINS, -1, 1)
    return [int(count) for count in counts]


def _in_memory(feature_NF: Tensor, label_N: Tensor) -> Features:
    """Those of images that have a label."""
    index_M = (label_N >= 0).nonzero()[:, 0].numpy()
    return Features(feature_NF.cpu().numpy(), label_N[index_M], index_M)
