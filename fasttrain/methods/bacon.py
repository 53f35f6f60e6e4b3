"""The self-balanced contrast of BaCon (arXiv 2310.01376) without labels: SimCLR, and images that prototypes put into
one class are positives, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.figures import batch_figures, mean_figures
from fasttrain.losses.multi_crop import crop_cross_entropy
from fasttrain.losses.multi_view import gather_views
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.losses.self_balanced import class_share, contrasts, move_prior, soft_classes
from fasttrain.losses.swapped import sinkhorn
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.bacon import BaConOptions
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.prototypes import Prototypes
from fasttrain.system.collectives import sum_over_ranks, world_size

CLASS_TEMPERATURE, EPSILON = 0.1, 0.05  # SwAV's, of predictions and of assignments


class BaCon(Method):
    """NT-Xent, the self-balanced contrast, and the regularisers that are on, the mean of both directions. The weight of
    the second grows from 0 over the run: the classes of a fresh encoder are arbitrary.

    Prototypes learn beside that, by predicting each view's even assignment from the other view (SwAV, arXiv
    2006.09882). Embeddings take no gradient of it: as with the paper's k-means, classes follow the embeddings.
    """

    def __init__(self, encoder: nn.Module, width: int, options: BaConOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)  # the networks are SimCLR's
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, [options.hidden], options.dim, "affine")
        self.prototypes = Prototypes(options.dim, options.prototypes)
        self.prior_C: Tensor
        self.register_buffer("prior_C", torch.full((options.prototypes,), 1 / options.prototypes))
        self._options = options

    def forward(self, sample: Sample) -> Output:
        feature_RF = self.encoder(sample.views[0].flatten(0, 1))
        out_RD = self.projector(feature_RF)
        with torch.autocast(out_RD.device.type, enabled=False):
            options, features = self._options, feature_RF.chunk(2)
            z_VND = F.normalize(out_RD.float(), dim=1).unflatten(0, (2, -1))
            with torch.no_grad():
                scores_VNC = self.prototypes(z_VND)
            classes = crop_cross_entropy(
                z_VND.detach(), self.prototypes.weight, sinkhorn(scores_VNC, EPSILON), CLASS_TEMPERATURE
            )
            p_NC = soft_classes(scores_VNC, self.prior_C, CLASS_TEMPERATURE)
            nt_xent, balanced, positives = contrasts(z_VND[0], z_VND[1], p_NC, options.temperature)
            weight = options.balanced_weight * sample.progress.part
            made = regularised(
                nt_xent + weight * balanced, options.regularisers, z_VND.flatten(0, 1),
                z_VND.flip(0).flatten(0, 1), None, None, directions=2,
            )  # fmt: skip
            loss, terms = with_features(made, options.regularisers, features, features[::-1])
            others = list(gather_views(z_VND.detach()))
            figures = mean_figures(
                [batch_figures(z_ND, k_ND, *others) for z_ND, k_ND in zip(z_VND, z_VND.flip(0), strict=True)]
            )
        terms |= {"contrast": nt_xent.detach(), "balanced": balanced.detach(), "prototypes": classes.detach()}
        terms |= {"positives": positives, **figures}
        share_C = class_share(scores_VNC, CLASS_TEMPERATURE)
        return Output(loss + classes, terms, (share_C[None],), features[0].detach())

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Prototypes back to unit length; the prior a step nearer to the classes of all ranks' images."""
        self.prototypes.normalise(good)
        move_prior(self.prior_C, sum_over_ranks(carry[0].mean(0)) / world_size(), good)
