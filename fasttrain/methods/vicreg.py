"""VICReg (arXiv 2105.04906): views agree, while each view's columns keep their variance and are uncorrelated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.losses.redundancy import vicreg
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.vicreg import VICRegOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp


class VICReg(Method):
    """Two views, each through the networks by itself, so that batch norm takes its statistics of one view."""

    def __init__(self, encoder: nn.Module, width: int, options: VICRegOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden, options.hidden), options.dim)
        self._weights = options.invariance_weight, options.variance_weight, options.covariance_weight

    def forward(self, sample: Sample) -> Output:
        feature_2NF = [self.encoder(view) for view in sample.views[0]]
        x_ND, y_ND = (self.projector(feature_NF) for feature_NF in feature_2NF)
        with torch.autocast(x_ND.device.type, enabled=False):
            return Output(*self.loss(x_ND, y_ND), features_NF=feature_2NF[0].detach())

    def loss(self, x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, before they are weighted, from this rank's embeddings of both views."""
        values = vicreg(x_ND, y_ND)
        loss = torch.stack([weight * value for weight, value in zip(self._weights, values, strict=True)]).sum()
        names = ("invariance", "variance", "covariance")
        return loss, {name: value.detach() for name, value in zip(names, values, strict=True)}
