"""BYOL (arXiv 2006.07733): a prediction from one view of the momentum network's projection of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.cosine import spread, squared_distance
from fasttrain.losses.regularisers import averaged, regularised, with_features
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.byol import BYOLOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy


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
        feature_2NF = [self.encoder(view) for view in (first, second)]
        q_2ND = [self._prediction(feature_NF) for feature_NF in feature_2NF]
        with torch.autocast(first.device.type, enabled=False):
            made = self.loss(q_2ND, k_2ND)
            loss, terms = with_features(made, self._options.regularisers, feature_2NF, feature_2NF[::-1])
        return Output(loss, terms, features_NF=feature_2NF[0].detach())

    def loss(self, q_2ND: list[Tensor], k_2ND: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's predictions of each view and what they are predictions of."""
        directions = [
            regularised(2 * squared_distance(q_ND, k_ND), self._options.regularisers, q_ND, k_ND, None, None)
            for q_ND, k_ND in zip(q_2ND, k_2ND, strict=True)
        ]
        loss, terms = averaged(directions)
        return loss, terms | {"std": spread(torch.cat(k_2ND))}

    def _prediction(self, feature_NF: Tensor) -> Tensor:
        """Normalised predictions (N, D) from what the encoder makes of a view."""
        return F.normalize(self.predictor(self.projector(feature_NF)).float(), dim=1)

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
