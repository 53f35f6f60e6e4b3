"""Hydra, of "Rethinking Positive Pairs" (arXiv 2410.18200): two classes attract each other in a space of their own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fasttrain.losses.figures import label_figures
from fasttrain.losses.gated import gate_figures, gated_contrast, paired_labels
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.hydra import HydraOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.gates import PairGates
from fasttrain.networks.heads import batch_norm_mlp


class Hydra(Method):
    """Rows of one view against the other view's rows of the class their own is paired with, the mean of both
    directions. An image's pair is the same in both. Figures are of the rows without gates, as SupCon's are."""

    def __init__(self, encoder: nn.Module, width: int, options: HydraOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)  # the networks are SimCLR's
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, [options.hidden], options.dim, "affine")
        self.gates = PairGates(options.classes, options.dim)
        self._temperature = options.temperature

    def forward(self, sample: Sample) -> Output:
        label_N = sample.label_B
        assert label_N is not None
        feature_RF = self.encoder(sample.views[0].flatten(0, 1))
        out_RD = self.projector(feature_RF)
        paired_N = paired_labels(label_N)
        gate_ND = self.gates(label_N, paired_N)
        with torch.autocast(out_RD.device.type, enabled=False):
            z_RD = F.normalize(out_RD.float(), dim=1)
            views = z_RD.chunk(2)
            both = [
                gated_contrast(z_ND, k_ND, gate_ND, label_N, paired_N, self._temperature)
                for z_ND, k_ND in (views, views[::-1])
            ]
            loss = torch.stack(both).mean()
            figures = label_figures(z_RD, label_N.repeat(2)) | gate_figures(gate_ND)
        return Output(loss, {"contrast": loss.detach(), **figures}, features_NF=feature_RF[: len(label_N)].detach())
