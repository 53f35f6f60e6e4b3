"""SimCLR (arXiv 2002.05709): two views of an image find each other among the other images of the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.anchored import anchored_margins
from fasttrain.losses.communities import community_contrast
from fasttrain.losses.contrast import decoupled, nt_xent
from fasttrain.losses.figures import batch_figures, mean_figures
from fasttrain.losses.learnt_augmentation import augmented_contrast, restraint, slowed
from fasttrain.losses.multi_crop import crop_cross_entropy
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.losses.swapped import sinkhorn
from fasttrain.methods.base import Method, Output, Sample
from fasttrain.methods.options.simclr import SimCLROptions
from fasttrain.networks.anchor import Anchor
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp, bottleneck
from fasttrain.networks.prototypes import WeightNormLinear
from fasttrain.system.collectives import gather_rows, sum_over_ranks, world_size

RESTRAINT = 0.1  # γ, as in the paper
MARGIN, SPLIT = 0.2, 0.5  # m and γ of margins beyond an anchor, as in the paper
EPSILON = 0.05  # weight of the assignments' entropy, as SwAV has it


class SimCLR(Method):
    """NT-Xent of two views, or its decoupled forms, and the regularisers that are on, the mean of both directions."""

    def __init__(self, encoder: nn.Module, width: int, options: SimCLROptions) -> None:
        super().__init__()
        zero_init_residual(encoder)  # as in the paper's code, whose head's last batch norm has a scale and no shift
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, [options.hidden], options.dim, "affine")
        self.augmenter = bottleneck(options.dim) if options.learnt_augmentation else None
        self.centres = WeightNormLinear(options.dim, options.communities) if options.communities else None
        self.anchor_encoder = Anchor(encoder) if options.anchor else None
        self._options = options

    def forward(self, sample: Sample) -> Output:
        # both views in one, as in the paper's code
        views = sample.views[0].flatten(0, 1)
        feature_RF = self.encoder(views)
        out_RD = self.projector(feature_RF)
        anchor_RF = None if self.anchor_encoder is None else self.anchor_encoder(views)
        with torch.autocast(out_RD.device.type, enabled=False):
            a_ND, b_ND = F.normalize(out_RD.float(), dim=1).chunk(2)
            z_RD, other_RD, features = torch.cat([a_ND, b_ND]), torch.cat([b_ND, a_ND]), feature_RF.chunk(2)
            asked = self._options.regularisers
            made = regularised(self.loss(a_ND, b_ND), asked, z_RD, other_RD, None, None, directions=2)
            loss, terms = with_features(made, asked, features, features[::-1])
            if self.augmenter is not None:
                learnt, more = self._learnt(out_RD.float())
                loss, terms = loss + learnt, terms | more
            if self.centres is not None:
                grouped, more = self._grouped(a_ND, b_ND, sample.progress.part)
                loss, terms = loss + grouped, terms | more
            if anchor_RF is not None:
                apart, more = self._apart(feature_RF, anchor_RF)
                loss, terms = loss + apart, terms | more
            others = gather_rows(torch.cat([a_ND, b_ND], 1).detach()).chunk(2, 1)
            figures = mean_figures([batch_figures(q, k, *others) for q, k in ((a_ND, b_ND), (b_ND, a_ND))])
        return Output(loss, terms | figures, features_NF=features[0].detach())

    def _grouped(self, a_ND: Tensor, b_ND: Tensor, part: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What communities add to the loss, and its terms. The centres learn to assign images evenly, from rows as they
        are; the rows learn from the contrast with the communities, ever more as the run goes on."""
        assert self.centres is not None
        options, centre_CD, z_2ND = self._options, self.centres.rows(), torch.stack([a_ND, b_ND]).detach()
        score_2NC = (z_2ND @ centre_CD.T).detach()
        assigned = crop_cross_entropy(z_2ND, centre_CD, sinkhorn(score_2NC, EPSILON), options.temperature)
        contrast = community_contrast(a_ND, b_ND, score_2NC[0], score_2NC[1], options.temperature)
        member_2NC = score_2NC.argmax(2, keepdim=True) == torch.arange(len(centre_CD), device=score_2NC.device)
        share_C = sum_over_ranks(member_2NC.float().mean((0, 1))) / world_size()
        terms = {
            "assigned": assigned.detach(), "community_contrast": contrast.detach(),
            "communities": torch.special.entr(share_C).sum().exp(),
        }  # fmt: skip
        return assigned + options.community_weight * (1 - math.exp(-2 * part)) * contrast, terms

    def _learnt(self, out_RD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What learnt augmentation adds to the loss, and its terms. One backward gives the augmenter and the encoder
        the gradients that are meant for each, where the paper alternates between them."""
        assert self.augmenter is not None
        options = self._options
        slow_RD = slowed(out_RD, options.learnt_augmentation)
        a_ND, b_ND = F.normalize(slow_RD, dim=1).chunk(2)
        za_ND, zb_ND = F.normalize(self.augmenter(slow_RD), dim=1).chunk(2)
        contrast = augmented_contrast(a_ND, b_ND, za_ND, zb_ND, options.temperature)
        z_RD = F.normalize(self.augmenter(out_RD), dim=1)
        restrained = restraint(*z_RD.chunk(2))
        terms = {
            "augmented": contrast.detach(), "restraint": restrained.detach(),
            "augmented_similarity": F.cosine_similarity(z_RD, out_RD).mean().detach(),
        }  # fmt: skip
        return contrast + RESTRAINT * restrained, terms

    def _apart(self, feature_RF: Tensor, anchor_RF: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What margins beyond the anchor add to the loss, and their terms."""
        z_2NF, anchor_2NF = (F.normalize(x.float(), dim=1).unflatten(0, (2, -1)) for x in (feature_RF, anchor_RF))
        absolute, relative, met = anchored_margins(z_2NF, anchor_2NF, MARGIN, SPLIT)
        terms = {"anchor_absolute": absolute.detach(), "anchor_relative": relative.detach(), "anchor_met": met}
        return self._options.anchor_weight * (absolute + relative), terms

    def loss(self, a_ND: Tensor, b_ND: Tensor) -> Tensor:
        """The loss of this rank's rows of two views."""
        options = self._options
        if options.decoupled or options.decoupled_weighted:
            return decoupled(a_ND, b_ND, options.temperature, options.decoupled_weighted)
        return nt_xent(a_ND, b_ND, options.temperature)
