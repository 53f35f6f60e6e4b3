"""MoCo v1/v2 (arXiv 1911.05722, 2003.04297): queries against a momentum encoder's keys and a queue of older keys.

`MoCo` with another contrast and other heads is ReSSL and SCE, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.queue import Decoupled, DecoupledWeighted, InfoNCE, QueueTerm
from fasttrain.losses.regularisers import Regularisers, regularised
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.batch_norm import is_split
from fasttrain.networks.heads import linear_head, mlp_head
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.queue import Queue
from fasttrain.networks.shuffle import encode_shuffled
from fasttrain.system.collectives import first_row, gather_rows
from fasttrain.system.options import Fraction, Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe


@dataclass(frozen=True)
class KeyOptions(MethodOptions):
    """What every method with a momentum encoder and a queue of its keys may be asked for."""

    dim: Positive[int] = 128
    """Width of queries and keys."""
    queue_size: Positive[int] = 65536
    """Keys kept as negatives."""
    ema: Momentum[float] = 0.999
    """Momentum of the key encoder."""
    ema_end: Fraction[float | None] = None
    """What that momentum rises to, along half a cosine. None: the same throughout."""
    regularisers: Regularisers = field(default_factory=Regularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""


# solo-learn's scripts/pretrain/imagenet-100/mocov2plus.yaml, but for its hidden layer of 2048, its queue for each
# direction, where this one takes the keys of both, and its SyncBN
_SYMMETRIC = {
    "symmetric": True, "crop_scale": (0.08, 1.0), "lr": 0.3, "weight_decay": 1e-4, "warmup_epochs": 10, "dim": 256,
    "ema": 0.99, "ema_end": 0.999,
}  # fmt: skip


@dataclass(frozen=True)
class MoCoOptions(KeyOptions):
    """MoCo v2 (arXiv 2003.04297): an image's query has to find the momentum encoder's key of its other view among a
    queue of other images' keys. MoCo v1 (arXiv 1911.05722) is --head linear, --temperature 0.07 and --recipe mocov1."""

    views: ClassVar[Recipe] = RECIPES["mocov2"]
    paper: ClassVar = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_norm": "split"}
    presets: ClassVar = {
        "imagenet100": _SYMMETRIC,
        "stl10": _SYMMETRIC,  # those of imagenet100: no public ones are known
        # MoCo's own CIFAR-10 notebook
        "cifar10": {
            "recipe": "cifar", "lr": 0.03, "weight_decay": 5e-4, "head": "linear", "queue_size": 4096, "ema": 0.99,
            "temperature": 0.1,
        },
        "demo": {"lr": 0.12, "weight_decay": 5e-4, "queue_size": 2048, "ema": 0.99, "temperature": 0.1},
    }  # fmt: skip

    head: Literal["mlp", "linear"] = "mlp"
    """Projection head: one hidden layer as wide as the features (MoCo v2), or linear (MoCo v1)."""
    temperature: Positive[float] = 0.2
    """Temperature of InfoNCE."""
    decoupled: bool = False
    """Leave a query's own key out of InfoNCE's denominator: the decoupled contrastive loss (arXiv 2110.06848)."""
    decoupled_weighted: bool = False
    """The same paper's DCLW: decoupled, and pairs that are far apart, among those of a micro-batch, weigh more."""
    symmetric: bool = False
    """Each view is query and key in turn (MoCo v2+), at twice the cost of a step: the mean of both directions, against
    one queue, which then takes the keys of both. Where published code sums them (MoCo's CIFAR-10 notebook), the same
    step is twice --lr and half --weight-decay."""

    def build(self, encoder: nn.Module, width: int) -> MoCo:
        projector = {"mlp": mlp_head, "linear": linear_head}[self.head](width, self.dim)
        contrast = DecoupledWeighted if self.decoupled_weighted else Decoupled if self.decoupled else InfoNCE
        return MoCo(encoder, projector, contrast(self.temperature), self, self.symmetric)


class MoCo(Method):
    """A contrast of view 0's query with view 1's key and the queue, and the regularisers that are on.

    Symmetric: view 1's query with view 0's key, too, against the same queue, and the mean of both directions. DCLW
    weighs the pairs of both together.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, contrast: QueueTerm, options: KeyOptions,
        symmetric: bool = False, predictor: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """encoder: (N, 3, S, S) → (N, width), its batch norm as it is to be. Where that is split, keys are shuffled.
        projector: (N, width) → (N, D). predictor: (N, D) → (N, D), of queries alone."""
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.predictor = predictor or nn.Identity()
        self.key_encoder = momentum_copy(self.encoder)
        self.key_projector = momentum_copy(self.projector)
        self.queue = Queue(options.queue_size, options.dim)
        self._options, self._contrast, self._shuffles = options, contrast, is_split(encoder)
        self._queried = (0, 1) if symmetric else (0,)  # views; the other one of the two gives the keys

    def forward(self, sample: Sample) -> Output:
        views = sample.views[0]
        keys = [self._keys(views[1 - view]) for view in self._queried]  # (M, D) of each direction
        q_RD = torch.cat([self._query(views[view]) for view in self._queried])
        count = views.shape[1]
        k_RD = torch.cat([k_MD[first_row(count) :][:count] for k_MD in keys])
        with torch.autocast(q_RD.device.type, enabled=False):
            loss, terms = self.loss(q_RD, k_RD, torch.cat(keys))
        return Output(loss, terms, tuple(keys))

    def loss(self, q_RD: Tensor, k_RD: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms. q_RD, k_RD: this rank's rows; k_MD: the rows of all ranks; each of one direction
        after the other."""
        return regularised(
            self._contrast, self._options.regularisers, q_RD, k_RD, k_MD, self.queue.keys_KD, len(self._queried)
        )

    def _query(self, view: Tensor) -> Tensor:
        return self._embed(self.predictor(self.projector(self.encoder(view))))

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
        """Move the key encoder and take the step's keys, (M, D) of each direction, into the queue."""
        momentum, end = self._options.ema, self._options.ema_end
        if end is not None:
            momentum = cosine_momentum(momentum, progress.part, end)
        ema_update(self.key_encoder, self.encoder, momentum, good)
        ema_update(self.key_projector, self.projector, momentum, good)
        self.queue.enqueue(torch.cat(carry), good)
