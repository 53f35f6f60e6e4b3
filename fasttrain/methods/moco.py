"""MoCo v1/v2 (arXiv 1911.05722, 2003.04297): queries against a momentum encoder's keys and a queue of older keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.queue import Decoupled, InfoNCE
from fasttrain.losses.regularisers import Regularisers, regularised
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.batch_norm import is_split
from fasttrain.networks.heads import linear_head, mlp_head
from fasttrain.networks.momentum import ema_update, momentum_copy
from fasttrain.networks.queue import Queue
from fasttrain.networks.shuffle import encode_shuffled
from fasttrain.system.collectives import first_row, gather_rows
from fasttrain.system.options import Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe


@dataclass(frozen=True)
class MoCoOptions(MethodOptions):
    """MoCo v2 (arXiv 2003.04297): an image's query has to find the momentum encoder's key of its other view among a
    queue of other images' keys. MoCo v1 (arXiv 1911.05722) is --head linear, --temperature 0.07 and --recipe mocov1."""

    views: ClassVar[Recipe] = RECIPES["mocov2"]
    paper: ClassVar = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_norm": "split"}
    presets: ClassVar = {
        # MoCo's own CIFAR-10 notebook
        "cifar10": {
            "recipe": "cifar", "lr": 0.03, "weight_decay": 5e-4, "head": "linear", "queue_size": 4096, "ema": 0.99,
            "temperature": 0.1,
        },
        "demo": {"lr": 0.12, "weight_decay": 5e-4, "queue_size": 2048, "ema": 0.99, "temperature": 0.1},
    }  # fmt: skip

    dim: Positive[int] = 128
    """Width of queries and keys."""
    head: Literal["mlp", "linear"] = "mlp"
    """Projection head: one hidden layer as wide as the features (MoCo v2), or linear (MoCo v1)."""
    queue_size: Positive[int] = 65536
    """Keys kept as negatives."""
    ema: Momentum[float] = 0.999
    """Momentum of the key encoder."""
    temperature: Positive[float] = 0.2
    """Temperature of InfoNCE."""
    decoupled: bool = False
    """Leave a query's own key out of InfoNCE's denominator: the decoupled contrastive loss (arXiv 2110.06848)."""
    regularisers: Regularisers = field(default_factory=Regularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> MoCo:
        return MoCo(encoder, width, self)


class MoCo(Method):
    """InfoNCE of view 0's query against view 1's key and the queue, with the regularisers that are on."""

    def __init__(self, encoder: nn.Module, width: int, options: MoCoOptions) -> None:
        """encoder: (N, 3, S, S) → (N, width), its batch norm as it is to be. Where that is split, keys are shuffled."""
        super().__init__()
        self.encoder = encoder
        head = {"mlp": mlp_head, "linear": linear_head}[options.head]
        self.projector = head(width, options.dim)
        self.key_encoder = momentum_copy(self.encoder)
        self.key_projector = momentum_copy(self.projector)
        self.queue = Queue(options.queue_size, options.dim)
        self._options, self._shuffles = options, is_split(encoder)
        self._contrast = (Decoupled if options.decoupled else InfoNCE)(options.temperature)

    def forward(self, sample: Sample) -> Output:
        query, key = sample.views[0]
        q_ND = self._embed(self.projector(self.encoder(query)))
        k_MD = self._keys(key)
        k_ND = k_MD[first_row(len(q_ND)) :][: len(q_ND)]
        with torch.autocast(q_ND.device.type, enabled=False):
            loss, terms = self.loss(q_ND, k_ND, k_MD)
        return Output(loss, terms, (k_MD,))

    def loss(self, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms. q_ND, k_ND: this rank's rows; k_MD: the rows of all ranks."""
        return regularised(self._contrast, self._options.regularisers, q_ND, k_ND, k_MD, self.queue.keys_KD)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys (M, D) of all ranks' images from this rank's view (N, 3, S, S). Shuffled where batch norm is split, so
        that an image's key and query are normalised with different groups."""
        return encode_shuffled(self._key, view) if self._shuffles else gather_rows(self._key(view))

    def _key(self, view: Tensor) -> Tensor:
        return self._embed(self.key_projector(self.key_encoder(view)))

    @staticmethod
    def _embed(out_ND: Tensor) -> Tensor:
        return F.normalize(out_ND.float(), dim=1)

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the key encoder and take the step's keys (M, D) into the queue."""
        (k_MD,) = carry
        ema_update(self.key_encoder, self.encoder, self._options.ema, good)
        ema_update(self.key_projector, self.projector, self._options.ema, good)
        self.queue.enqueue(k_MD, good)
