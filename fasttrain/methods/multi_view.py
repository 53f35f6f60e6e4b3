"""Any number of views of an image, compared in one term over the batch: MV-InfoNCE, MV-DHEL (arXiv 2507.06979) and CACR
(arXiv 2105.03746)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.figures import batch_figures, mean_figures
from fasttrain.losses.multi_view import gather_views
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.multi_view import MultiViewOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp


class MultiView(Method):
    """A contrast of V views, with the regularisers that are on: of each view and the one after it, the last with the
    first, but for compactness, which is of all pairs. The figures are of the neighbours, too."""

    def __init__(
        self, encoder: nn.Module, width: int, contrast: Callable[[Tensor], dict[str, Tensor]], options: MultiViewOptions
    ) -> None:
        """contrast: of rows (V, N, D), its parts by name, whose sum is the loss."""
        super().__init__()
        zero_init_residual(encoder)  # the networks are SimCLR's
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, [options.hidden], options.dim, "affine")
        self._contrast, self._options = contrast, options

    def forward(self, sample: Sample) -> Output:
        (views,) = sample.views
        feature_RF = self.encoder(views.flatten(0, 1))
        out_RD = self.projector(feature_RF)
        with torch.autocast(out_RD.device.type, enabled=False):
            count, options = len(views), self._options
            z_RD = F.normalize(out_RD.float(), dim=1)
            z_VND = z_RD.unflatten(0, (count, -1))
            features = list(feature_RF.chunk(count))
            parts = self._contrast(z_VND)
            made = regularised(
                torch.stack(list(parts.values())).sum(), options.regularisers, z_RD, z_VND.roll(-1, 0).flatten(0, 1),
                None, None, directions=count, pairs=list(permutations(z_VND, 2)),
            )  # fmt: skip
            loss, terms = with_features(made, options.regularisers, features, features[1:] + features[:1])
            others = list(gather_views(z_VND.detach()))
            figures = mean_figures(
                [batch_figures(z_ND, next_ND, *others) for z_ND, next_ND in zip(z_VND, z_VND.roll(-1, 0), strict=True)]
            )
        terms |= {name: part.detach() for name, part in parts.items()}
        return Output(loss, terms | figures, features_NF=features[0].detach())
