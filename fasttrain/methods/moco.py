"""MoCo v1/v2 (arXiv 1911.05722, 2003.04297): queries against a momentum encoder's keys and a queue of older keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config import TrainConfig
from fasttrain.kernels import similarity
from fasttrain.methods.base import Method
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.momentum import ema_update, momentum_copy
from fasttrain.networks.queue import Queue
from fasttrain.networks.shuffle import encode_shuffled
from fasttrain.system.collectives import gather_rows, rank


def make_projector(width: int, dim: int, head: str) -> nn.Module:
    """(N, width) → (N, dim): linear (MoCo v1) or one hidden layer as wide as the features (MoCo v2)."""
    if head == "linear":
        return nn.Linear(width, dim)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))


class MoCo(Method):
    """InfoNCE of view 0's query against view 1's key and the queue."""

    def __init__(self, encoder: nn.Module, feature_width: int, config: TrainConfig) -> None:
        super().__init__(config, feature_width)
        self.encoder = convert_batch_norm(encoder, config.batch_norm)
        self.projector = make_projector(feature_width, config.dim, config.head)
        self.key_encoder = momentum_copy(self.encoder)
        self.key_projector = momentum_copy(self.projector)
        self.queue = Queue(config.queue_size, config.dim)
        self._new_keys: list[Tensor] = []  # (M, D) of every micro-batch of the step

    def forward(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, 2, 3, S, S) → scalar loss in fp32, and its detached terms."""
        q_ND = self._embed(self.projector(self.encoder(views[:, 0])))
        k_MD = self._keys(views[:, 1])
        k_ND = k_MD[rank() * len(q_ND) :][: len(q_ND)]
        with torch.autocast(q_ND.device.type, enabled=False):
            loss, terms = self.loss(q_ND, k_ND, k_MD)
        self._new_keys.append(k_MD)
        return loss, {"loss": loss.detach(), **terms}

    def loss(self, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """q_ND, k_ND this rank's rows; k_MD the rows of all ranks."""
        config = self.config
        terms = similarity.queue_terms(q_ND, k_ND, self.queue.keys_KD, config.temperature, decoupled=config.decoupled)
        return terms.contrast, {}

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys (M, D) of all ranks' images from this rank's view (N, 3, S, S). Shuffled where batch norm is split, so
        that an image's key and query are normalised with different groups."""
        if self.config.batch_norm == "split":
            return encode_shuffled(self._key, view)
        return gather_rows(self._key(view))

    def _key(self, view: Tensor) -> Tensor:
        return self._embed(self.key_projector(self.key_encoder(view)))

    @staticmethod
    def _embed(out_ND: Tensor) -> Tensor:
        return F.normalize(out_ND.float(), dim=1)

    @torch.no_grad()
    def after_step(self, good: Tensor | None = None) -> None:
        """Move the key encoder and take the step's keys into the queue."""
        ema_update(self.key_encoder, self.encoder, self.config.ema, good)
        ema_update(self.key_projector, self.projector, self.config.ema, good)
        if self._new_keys:
            self.queue.enqueue(torch.cat(self._new_keys), good)
            self._new_keys = []
