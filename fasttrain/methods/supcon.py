"""SupCon (arXiv 2004.11362): the views of a batch that have one label are each other's positives."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fasttrain.losses.contrast import sup_con
from fasttrain.losses.figures import label_figures
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.supcon import SupConOptions
from fasttrain.networks.heads import mlp_head


class SupCon(Method):
    """Supervised contrast over the views of all ranks."""

    def __init__(self, encoder: nn.Module, width: int, options: SupConOptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp_head(width, options.dim, options.hidden)
        self._temperature = options.temperature

    def forward(self, sample: Sample) -> Output:
        assert sample.label_B is not None
        (views,) = sample.views
        feature_RF = self.encoder(views.flatten(0, 1))
        out_RD = self.projector(feature_RF)
        with torch.autocast(out_RD.device.type, enabled=False):
            z_RD = F.normalize(out_RD.float(), dim=1)
            label_R = sample.label_B.repeat(len(views))
            loss = sup_con(z_RD, label_R, self._temperature)
            figures = label_figures(z_RD, label_R)
        terms = {"contrast": loss.detach(), **figures}
        return Output(loss, terms, features_NF=feature_RF[: views.shape[1]].detach())
