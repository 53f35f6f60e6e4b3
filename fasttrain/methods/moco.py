"""MoCo v1/v2 (arXiv 1911.05722, 2003.04297): queries against a momentum encoder's keys and a queue of older keys.

`MoCo` with another contrast and other heads is ReSSL and SCE, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.feature_transform import Transform, drawn_for, scores, transformed, transformed_contrast
from fasttrain.losses.figures import queue_figures
from fasttrain.losses.queue import QueueTerm, read_queue
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.losses.weighted_negatives import clustered_contrast, gated_contrast
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.moco import KeyOptions
from fasttrain.networks.batch_norm import is_split
from fasttrain.networks.clusters import Clusters
from fasttrain.networks.foreground import RegionEncoder, Regions, map_place
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.pair_gate import PairGate
from fasttrain.networks.queue import Queue
from fasttrain.networks.shuffle import Shuffled
from fasttrain.system.collectives import gather_rows, own_rows, world_size


class KeyMethod(Method):
    """The networks of queries and keys, and the queue: what every method with a momentum encoder's keys has."""

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, options: KeyOptions, predictor: nn.Module | None = None
    ) -> None:
        """encoder: (N, 3, S, S) → (N, width), its batch norm as it is to be. Where that is split, keys are shuffled.
        projector: (N, width) → (N, D). predictor: (N, D) → (N, D), of queries alone."""
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.predictor = predictor or nn.Identity()
        self.key_encoder = momentum_copy(self.encoder)
        self.key_projector = momentum_copy(self.projector)
        self.queue = Queue(options.queue_size, options.dim)
        self._options, self._shuffles = options, is_split(encoder)

    def _query(self, feature_NF: Tensor) -> Tensor:
        return self._embed(self.predictor(self.projector(feature_NF)))

    def _coming(self, view: Tensor) -> Tensor | Shuffled:
        """The images of which this rank makes keys. Shuffled where batch norm is split, so that an image's key and
        query are normalised with different groups."""
        return Shuffled(view) if self._shuffles else view

    @torch.no_grad()
    def _keys(self, images: Tensor | Shuffled) -> Tensor:
        """Keys (M, D) of all ranks' images, in rank order, and behind them what the encoder gave, if it is compared."""
        return images.encoded(self._key) if isinstance(images, Shuffled) else gather_rows(self._key(images))

    def _keys_and_features(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (M, D) of all ranks' images of one view, and what the encoder gave: (M, F), or (M, 0) where nothing
        compares it."""
        k_MD, feature_MF = self._keys(self._coming(view)).tensor_split([self._options.dim], 1)
        return k_MD, feature_MF

    def _key(self, view: Tensor) -> Tensor:
        feature_NF = self.key_encoder(view)
        k_ND = self._embed(self.key_projector(feature_NF))
        return torch.cat([k_ND, feature_NF], 1) if self._options.regularisers.of_encoder else k_ND

    @staticmethod
    def _embed(out_ND: Tensor) -> Tensor:
        return F.normalize(out_ND.float(), dim=1)

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the key encoder and take the step's keys, (M, D) of each direction, into the queue."""
        momentum, end = self._options.ema, self._options.ema_end
        if end is not None:
            momentum = cosine_momentum(momentum, progress.part, end)
        ema_update(self.key_encoder, self.encoder, momentum, good)
        ema_update(self.key_projector, self.projector, momentum, good)
        self.queue.enqueue(torch.cat(carry), good)


class MoCo(KeyMethod):
    """A contrast of view 0's query with view 1's key and the queue, and the regularisers that are on.

    Symmetric: view 1's query with view 0's key, too, against the same queue, and the mean of both directions. DCLW
    weighs the pairs of both together.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, contrast: QueueTerm, options: KeyOptions,
        symmetric: bool = False, predictor: nn.Module | None = None, feature_transform: bool = False,
        negatives: Clusters | PairGate | None = None, foreground: float = 0.0,
    ) -> None:  # fmt: skip
        """The networks: see KeyMethod. feature_transform: the contrast is of transformed rows. negatives: what weighs
        them in a decoupled contrast, of which only the temperature is then taken; None: all are alike. foreground: the
        weight of a contrast of foregrounds; 0: there is none."""
        super().__init__(encoder, projector, options, predictor)
        self.negatives = negatives
        self.region_queue = Queue(options.queue_size, options.dim) if foreground else None
        self._foreground, place = foreground, map_place(encoder) if foreground else ""
        self._regions, self._key_regions = (
            RegionEncoder(network, place) if foreground else None for network in (self.encoder, self.key_encoder)
        )
        self._contrast, self._transforms = contrast, feature_transform
        self._queried = (0, 1) if symmetric else (0,)  # views; the other one of the two gives the keys

    def forward(self, sample: Sample) -> Output:
        views = sample.views[0]
        # Keys first: their activations are gone before the queries' are kept. But images travel while queries are made.
        coming, travel = [self._coming(views[1 - view]) for view in self._queried], self._shuffles and world_size() > 1
        made = [] if travel else [self._keys(images) for images in coming]  # (M, D) of each direction
        regions = [self._regions(views[view]) for view in self._queried] if self._regions else []
        features = [seen.feature_NF for seen in regions] or [self.encoder(views[view]) for view in self._queried]
        q_RD = torch.cat([self._query(feature_NF) for feature_NF in features])
        made = made or [self._keys(images) for images in coming]
        own, dim = own_rows(views.shape[1]), q_RD.shape[1]
        columns = [dim, 3 * dim if regions else dim]
        keys, region_keys, key_features = zip(*(rows_M.tensor_split(columns, 1) for rows_M in made), strict=True)
        k_RD = torch.cat([k_MD[own] for k_MD in keys])
        with torch.autocast(q_RD.device.type, enabled=False):
            loss, terms = with_features(
                self.loss(q_RD, k_RD, torch.cat(keys)), self._options.regularisers, features,
                [feature_MF[own] for feature_MF in key_features],
            )  # fmt: skip
        if self.region_queue is None:
            return Output(loss, terms, keys, features[0].detach())
        term, more = self._of_foregrounds(regions, torch.cat([rows_M[own, :dim] for rows_M in region_keys]))
        return Output(loss + self._foreground * term, terms | more, (*keys, *region_keys), features[0].detach())

    def _key(self, view: Tensor) -> Tensor:
        """Behind the key those of the foreground and of the background, where they are compared."""
        if self._key_regions is None:
            return super()._key(view)
        seen = self._key_regions(view)
        k_ND, region_RD = (
            self._embed(self.key_projector(rows)) for rows in (seen.feature_NF, seen.region_N2F.flatten(0, 1))
        )
        of_encoder = [seen.feature_NF] if self._options.regularisers.of_encoder else []
        return torch.cat([k_ND, region_RD.view(len(view), -1), *of_encoder], 1)

    def _of_foregrounds(self, regions: list[Regions], k_RD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast of foregrounds with those of the keys, (R, D), and with other images' regions, and figures."""
        assert self.region_queue is not None
        q_RD = self._query(torch.cat([seen.region_N2F[:, 0] for seen in regions]))
        with torch.autocast(q_RD.device.type, enabled=False):
            read = read_queue([self._contrast], q_RD, k_RD, self.region_queue.keys_KD)
            term = self._contrast.value(q_RD, k_RD, read)
            figures = queue_figures(self._contrast, q_RD, k_RD, read)
        return term, {
            "foreground": term.detach(), "foreground_accuracy": figures["contrastive_accuracy"],
            "foreground_area": torch.cat([seen.area_N for seen in regions]).mean(),
        }  # fmt: skip

    def loss(self, q_RD: Tensor, k_RD: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms. q_RD, k_RD: this rank's rows; k_MD: the rows of all ranks; each of one direction
        after the other."""
        queue_KD, regularisers, directions = self.queue.keys_KD, self._options.regularisers, len(self._queried)
        drawn: Transform | None = None
        figures: dict[str, Tensor] = {}
        if self._transforms:
            drawn, figures = drawn_for(self._contrast, q_RD, k_RD, queue_KD, self.queue.is_full)
        contrast, more = self._contrasted(q_RD, k_RD, queue_KD, drawn)
        loss, terms = regularised(contrast, regularisers, q_RD, k_RD, k_MD, queue_KD, directions)
        return loss, terms | more | figures | {"queue_filled": self.queue.filled}

    def _contrasted(
        self, q_RD: Tensor, k_RD: Tensor, queue_KD: Tensor, drawn: Transform | None
    ) -> tuple[QueueTerm | Tensor, dict[str, Tensor]]:
        """The contrast, or its value and its figures where it is one of transformed rows or weighted negatives."""
        if self.negatives is None:
            return transformed_contrast(self._contrast, q_RD, k_RD, queue_KD, drawn) if drawn else (self._contrast, {})
        rows = transformed(q_RD, k_RD, queue_KD, drawn) if drawn else (q_RD, k_RD, queue_KD)
        temperature = self._contrast.temperature
        if isinstance(self.negatives, PairGate):
            value, figures = gated_contrast(*rows, temperature, self.negatives.of_pairs, k_RD)
        else:
            own_GR, key_GK = self.negatives.of(k_RD.to(queue_KD.dtype)), self.negatives.of(queue_KD)
            value, figures = clustered_contrast(*rows, temperature, own_GR, key_GK, self.queue.is_full, drawn)
        return value, figures | scores(*rows) if drawn else figures

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the key encoder, the queues, and what clusters the first."""
        keys, regions = carry[: len(self._queried)], carry[len(self._queried) :]
        super().update(good, progress, keys)
        if self.region_queue is not None:  # foreground and background of an image in turn
            self.region_queue.enqueue(torch.cat(regions).view(-1, self._options.dim), good)
        if isinstance(self.negatives, Clusters):
            self.negatives.follow(self.queue.keys_KD, good)
