"""BYOL (arXiv 2006.07733): a prediction from one view of the momentum network's projection of the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.cosine import spread, squared_distance
from fasttrain.losses.regularisers import BatchRegularisers, averaged, regularised
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.system.options import Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/byol.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {
    "lr": 0.5, "weight_decay": 1e-6, "trust": 0.02, "trust_clip": True, "ema": 0.99, "predictor_hidden": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class BYOLOptions(MethodOptions):
    """BYOL (arXiv 2006.07733): from each view, predict the projection that a momentum network makes of the other. There
    are no negatives; the defaults are those of the paper's 1000 epochs."""

    views: ClassVar[Recipe] = RECIPES["byol"]
    # section 3.3, and google-deepmind/deepmind-research: byol/configs/byol.py, which for 100 epochs has --lr 0.45, for
    # 300 --lr 0.3, and --weight-decay 1e-6 and --ema 0.99 for both
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 4096, "epochs": 1000, "optimizer": "lars", "lr": 0.2,
        "weight_decay": 1.5e-6, "warmup_epochs": 10,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/byol.yaml
        "cifar10": {
            "batch_size": 256, "epochs": 1000, "lr": 1.0, "weight_decay": 1e-5, "trust": 0.02, "trust_clip": True,
            "ema": 0.99, "recipe": "cifar-asymmetric",
        },
        "demo": {
            "optimizer": "sgd", "lr": 0.5, "weight_decay": 5e-4, "epochs": 12, "warmup_epochs": 1, "ema": 0.9,
            "hidden": 512, "predictor_hidden": 512, "recipe": "mocov2",
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of projections and predictions."""
    hidden: Positive[int] = 4096
    """Width of the projector's hidden layer."""
    predictor_hidden: Positive[int] = 4096
    """Width of the predictor's hidden layer."""
    ema: Momentum[float] = 0.996
    """Momentum of the momentum network at the start; it rises to 1."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> BYOL:
        return BYOL(encoder, width, self)


class BYOL(Method):
    """The squared distances of each view's prediction from the other view's target, and the regularisers that are on.

    The momentum network's batch norm has the statistics of its batch, as the trained one's.
    """

    def __init__(self, encoder: nn.Module, width: int, options: BYOLOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)  # as in the blocks that the paper's code uses, dm-haiku's
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden,), options.dim)
        self.predictor = batch_norm_mlp(options.dim, (options.predictor_hidden,), options.dim)
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self._options = options

    def forward(self, sample: Sample) -> Output:
        first, second = sample.views[0]
        k_2ND = [self._target(view) for view in (second, first)]
        q_2ND = [self._prediction(view) for view in (first, second)]
        with torch.autocast(first.device.type, enabled=False):
            return Output(*self.loss(q_2ND, k_2ND))

    def loss(self, q_2ND: list[Tensor], k_2ND: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's predictions of each view and what they are predictions of."""
        directions = [
            regularised(2 * squared_distance(q_ND, k_ND), self._options.regularisers, q_ND, k_ND, None, None)
            for q_ND, k_ND in zip(q_2ND, k_2ND, strict=True)
        ]
        loss, terms = averaged(directions)
        return loss, terms | {"std": spread(torch.cat(k_2ND))}

    def _prediction(self, view: Tensor) -> Tensor:
        """Normalised predictions (N, D) from a view (N, 3, S, S)."""
        return F.normalize(self.predictor(self.projector(self.encoder(view))).float(), dim=1)

    @torch.no_grad()
    def _target(self, view: Tensor) -> Tensor:
        """Normalised projections (N, D) of a view (N, 3, S, S)."""
        return F.normalize(self.momentum_projector(self.momentum_encoder(view)).float(), dim=1)

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the momentum network."""
        momentum = cosine_momentum(self._options.ema, progress.part)
        ema_update(self.momentum_encoder, self.encoder, momentum, good)
        ema_update(self.momentum_projector, self.projector, momentum, good)
