"""SimSiam (arXiv 2011.10566): a prediction from one view of the same network's projection of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.cosine import negative_cosine, spread
from fasttrain.losses.regularisers import averaged, regularised, with_features
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.simsiam import SimSiamOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp


class SimSiam(Method):
    """The negative cosine of each view's prediction and the other view's projection, and the regularisers that are on.

    "std" among its terms tells a collapse: see `spread`.
    """

    steady = ("predictor",)

    def __init__(self, encoder: nn.Module, width: int, options: SimSiamOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)
        self.encoder = encoder
        hidden = (options.hidden,) * (options.projector_layers - 1)
        self.projector = batch_norm_mlp(width, hidden, options.dim, "norm")
        self.predictor = batch_norm_mlp(options.dim, (options.predictor_hidden,), options.dim, "bias")
        self._options = options

    def forward(self, sample: Sample) -> Output:
        feature_2NF = [self.encoder(view) for view in sample.views[0]]
        z_2ND = [self.projector(feature_NF) for feature_NF in feature_2NF]
        p_2ND = [self.predictor(z_ND) for z_ND in z_2ND]
        with torch.autocast(z_2ND[0].device.type, enabled=False):
            q_2ND, k_2ND = ([F.normalize(x.float(), dim=1) for x in both] for both in (p_2ND, z_2ND))
            made = self.loss(q_2ND, [k_ND.detach() for k_ND in reversed(k_2ND)])
            loss, terms = with_features(made, self._options.regularisers, feature_2NF, feature_2NF[::-1])
        return Output(loss, terms, features_NF=feature_2NF[0].detach())

    def loss(self, q_2ND: list[Tensor], k_2ND: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's predictions of each view and what they are predictions of."""
        directions = [
            regularised(negative_cosine(q_ND, k_ND), self._options.regularisers, q_ND, k_ND, None, None)
            for q_ND, k_ND in zip(q_2ND, k_2ND, strict=True)
        ]
        loss, terms = averaged(directions)
        return loss, terms | {"std": spread(torch.cat(k_2ND))}
