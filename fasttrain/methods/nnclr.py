"""NNCLR (arXiv 2104.14548): the positive of a view is the nearest neighbour of the other one in a support set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.kernels.similarity import nearest
from fasttrain.losses.figures import batch_figures, mean_figures
from fasttrain.losses.neighbours import neighbour_contrast
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.nnclr import NNCLROptions
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.queue import Queue
from fasttrain.system.collectives import gather_rows


class NNCLR(Method):
    """Neighbours of one view's embeddings against the other view's predictions, the mean of both directions."""

    def __init__(self, encoder: nn.Module, width: int, options: NNCLROptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden, options.hidden), options.dim, "affine")
        self.predictor = batch_norm_mlp(options.dim, (options.predictor_hidden,), options.dim, "bias")
        self.queue = Queue(options.queue_size, options.dim)
        self._options = options

    def forward(self, sample: Sample) -> Output:
        features = [self.encoder(view) for view in sample.views[0]]
        out = [self.projector(feature_NF) for feature_NF in features]
        predictions = [F.normalize(self.predictor(out_ND).float(), dim=1) for out_ND in out]
        embeddings = [F.normalize(out_ND.detach().float(), dim=1) for out_ND in out]
        gathered = [gather_rows(z_ND) for z_ND in embeddings]
        with torch.autocast(out[0].device.type, enabled=False):  # view 0's predictions first, with view 1 as keys
            made = self.loss(torch.cat(predictions), torch.cat(embeddings[::-1]), torch.cat(gathered[::-1]))
            loss, terms = with_features(made, self._options.regularisers, features, features[::-1])
        return Output(loss, terms, (gathered[0],), features[0].detach())

    def loss(self, p_RD: Tensor, z_RD: Tensor, z_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms. p_RD, z_RD: predictions and the other view's embeddings of this rank; z_MD: those of
        all ranks; each of one direction after the other.

        The similarity of embeddings to their neighbours is a term beside it: it says, without labels, how far the
        positives are from the images themselves. Near 1 from the start, all features are alike.
        """
        options, neighbour_RD = self._options, self._neighbours(z_RD)
        directions = list(zip(neighbour_RD.chunk(2), p_RD.chunk(2), strict=True))
        contrast = [
            neighbour_contrast(n_ND, p_ND, options.temperature, options.decoupled, options.decoupled_weighted)
            for n_ND, p_ND in directions
        ]
        mean = torch.stack(contrast).mean()
        loss, terms = regularised(mean, options.regularisers, p_RD, z_RD, z_MD, self.queue.keys_KD, directions=2)
        terms |= mean_figures([batch_figures(n_ND, p_ND, gather_rows(p_ND.detach())) for n_ND, p_ND in directions])
        return loss, terms | {"neighbour": (neighbour_RD * z_RD).sum(1).mean(), "queue_filled": self.queue.filled}

    def _neighbours(self, z_RD: Tensor) -> Tensor:
        """The nearest rows of the queue."""
        keys_KD = self.queue.keys_KD
        return F.normalize(keys_KD[nearest(z_RD.to(keys_KD.dtype), keys_KD)].to(z_RD.dtype), dim=1)

    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Take view 0's embeddings (M, D) of all ranks into the queue, now that all have looked up their neighbours."""
        self.queue.enqueue(carry[0], good)
