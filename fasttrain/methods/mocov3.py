"""MoCo v3 (arXiv 2104.02057): predictions against the momentum network's keys of the other view, those of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.batch import batch_info_nce
from fasttrain.losses.figures import batch_figures
from fasttrain.losses.regularisers import averaged, regularised, with_features
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.mocov3 import MoCoV3Options
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.vision_transformer import freeze_patches, patch_projection
from fasttrain.system.collectives import gather_rows, own_rows


class MoCoV3(Method):
    """InfoNCE of both directions, times 2τ, and the regularisers that are on.

    A vision transformer has deeper heads, and its patch projection stays as it was drawn (section 4.2).
    """

    def __init__(self, encoder: nn.Module, width: int, options: MoCoV3Options) -> None:
        super().__init__()
        zero_init_residual(encoder)
        freeze_patches(encoder)
        deeper = patch_projection(encoder) is not None
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden,) * (2 if deeper else 1), options.dim, "norm")
        self.predictor = batch_norm_mlp(
            options.dim, (options.predictor_hidden,), options.dim, "norm" if deeper else "linear"
        )
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self._options = options

    def forward(self, sample: Sample) -> Output:
        first, second = sample.views[0]
        k_2MD = [self._keys(view) for view in (second, first)]
        feature_2NF = [self.encoder(view) for view in (first, second)]
        q_2ND = [self._queries(feature_NF) for feature_NF in feature_2NF]
        with torch.autocast(first.device.type, enabled=False):
            made = self.loss(q_2ND, k_2MD)
            loss, terms = with_features(made, self._options.regularisers, feature_2NF, feature_2NF[::-1])
        return Output(loss, terms, features_NF=feature_2NF[0].detach())

    def loss(self, q_2ND: list[Tensor], k_2MD: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's queries of each view and all ranks' keys of the other.

        Both directions are summed up, as in the paper's algorithm 1: twice their mean.
        """
        temperature, directions = self._options.temperature, []
        for q_ND, k_MD in zip(q_2ND, k_2MD, strict=True):
            k_ND = k_MD[own_rows(len(q_ND))]
            contrast = 2 * (2 * temperature) * batch_info_nce(q_ND, k_MD, temperature)
            loss, terms = regularised(contrast, self._options.regularisers, q_ND, k_ND, k_MD, None)
            directions.append((loss, terms | batch_figures(q_ND, k_ND, k_MD)))
        return averaged(directions)

    def _queries(self, feature_NF: Tensor) -> Tensor:
        """Queries (N, D) of what the encoder makes of this rank's view."""
        return F.normalize(self.predictor(self.projector(feature_NF)).float(), dim=1)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys (M, D) of all ranks' images from this rank's view (N, 3, S, S)."""
        return gather_rows(F.normalize(self.momentum_projector(self.momentum_encoder(view)).float(), dim=1))

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the momentum network."""
        momentum = cosine_momentum(self._options.ema, progress.part)
        ema_update(self.momentum_encoder, self.encoder, momentum, good)
        ema_update(self.momentum_projector, self.projector, momentum, good)
