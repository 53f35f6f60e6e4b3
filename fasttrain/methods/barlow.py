"""Barlow Twins (arXiv 2103.03230): the cross-correlation of two views' embeddings is to be the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.losses.redundancy import barlow
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.barlow import BarlowOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp


class Barlow(Method):
    """Two views, each through the networks by itself, so that batch norm takes its statistics of one view."""

    def __init__(self, encoder: nn.Module, width: int, options: BarlowOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden, options.hidden), options.dim)
        self._redundancy_weight = options.redundancy_weight

    def forward(self, sample: Sample) -> Output:
        feature_2NF = [self.encoder(view) for view in sample.views[0]]
        x_ND, y_ND = (self.projector(feature_NF) for feature_NF in feature_2NF)
        with torch.autocast(x_ND.device.type, enabled=False):
            return Output(*self.loss(x_ND, y_ND), features_NF=feature_2NF[0].detach())

    def loss(self, x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, before they are weighted, from this rank's embeddings of both views."""
        invariance, redundancy = barlow(x_ND, y_ND)
        terms = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
        return invariance + self._redundancy_weight * redundancy, terms
