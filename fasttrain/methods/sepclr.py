"""SepCLR (arXiv 2402.11928): what targets have in common with a background, and what is their own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.figures import batch_figures, mean_figures
from fasttrain.losses.multi_view import gather_views
from fasttrain.losses.separation import separation
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.sepclr import SepCLROptions
from fasttrain.networks.heads import batch_norm_mlp

JOINT_WEIGHT = 10.0  # as in the paper's code


class SepCLR(Method):
    """Two encoders of the same form, which begin alike. Figures are of the common embeddings, whose loss is a contrast
    over all images."""

    encoders = ("encoder", "salient_encoder")

    def __init__(self, encoder: nn.Module, width: int, options: SepCLROptions) -> None:
        super().__init__()
        self.encoder, self.salient_encoder = encoder, copy.deepcopy(encoder)
        # a bias, as background is to lie at the origin of the salient space
        self.projector, self.salient_projector = (
            batch_norm_mlp(width, [options.hidden], options.dim, "bias") for _ in range(2)
        )
        self._options = options

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """Those that are asked for."""
        if self._options.evaluated == "common":
            return self.encoder, self.projector
        return self.salient_encoder, self.salient_projector

    def forward(self, sample: Sample) -> Output:
        assert sample.label_B is not None
        view_RCHW, options = sample.views[0].flatten(0, 1), self._options
        common_RF, salient_RF = self.encoder(view_RCHW), self.salient_encoder(view_RCHW)
        c_RD, s_RD = self.projector(common_RF), self.salient_projector(salient_RF)
        background_N = _any_of(sample.label_B, options.background)
        with torch.autocast(c_RD.device.type, enabled=False):
            c_VND = F.normalize(c_RD.float(), dim=1).unflatten(0, (2, -1))
            parts = separation(c_VND, s_RD.float().unflatten(0, (2, -1)), background_N, options.temperature)
            apart = options.salient_weight * (parts.salient + parts.background) + JOINT_WEIGHT * parts.joint
            others = list(gather_views(c_VND.detach()))
            figures = mean_figures([batch_figures(*pair, *others) for pair in (c_VND, c_VND.flip(0))])
        terms = {name: value.detach() for name, value in parts._asdict().items()}
        terms |= {"background_share": background_N.float().mean(), **figures}
        feature_RF = common_RF if options.evaluated == "common" else salient_RF
        return Output(parts.common + apart, terms, features_NF=feature_RF.chunk(2)[0].detach())


def _any_of(label_N: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Which labels are among the numbers, (N,). No number is that of an image without a label, which is negative."""
    return torch.stack([label_N == number for number in numbers]).any(0)
