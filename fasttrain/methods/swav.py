"""SwAV (arXiv 2006.09882): every view predicts to which prototypes another view of its image was assigned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.multi_crop import crop_cross_entropy, cross_entropy_terms
from fasttrain.losses.swapped import sinkhorn
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.swav import SwAVOptions
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.multi_crop import encode_crops
from fasttrain.networks.prototypes import Prototypes
from fasttrain.networks.queue import Queue
from fasttrain.system.collectives import gather_rows, rank, world_size

VIEWS = 2  # of full size, which assign


class SwAV(Method):
    """Swapped prediction over views of any number of sizes."""

    def __init__(self, encoder: nn.Module, width: int, options: SwAVOptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, [options.hidden], options.dim, "bias")
        self.prototypes = Prototypes(options.dim, options.prototypes)
        self.queue = Queue(options.queue_size, VIEWS * options.dim, empty=True) if options.queue_size else None
        self._options = options

    def forward(self, sample: Sample) -> Output:
        feature_RF = encode_crops(self.encoder, sample.views)
        out = self.projector(feature_RF)
        with torch.autocast(out.device.type, enabled=False):
            z_VND = F.normalize(out.float(), dim=1).unflatten(0, (-1, sample.views[0].shape[1]))
            target_ANP = self._assigned(z_VND[:VIEWS].detach(), sample.progress)
            loss = crop_cross_entropy(z_VND, self.prototypes.weight, target_ANP, self._options.temperature)
            terms = cross_entropy_terms(loss, target_ANP)
        if self.queue is not None:
            terms["queue_filled"] = self.queue.filled
        carry = z_VND[:VIEWS].detach().transpose(0, 1).flatten(1)
        return Output(loss, terms, (carry,), feature_RF[: len(carry)].detach())

    @torch.no_grad()
    def _assigned(self, z_AND: Tensor, progress: Progress) -> Tensor:
        scores_ANP, epsilon = self.prototypes(z_AND), self._options.epsilon
        if self.queue is None or progress.epoch < self._options.queue_epoch:
            return sinkhorn(scores_ANP, epsilon)
        own_KD = self.queue.keys_KD[rank() :: world_size()]  # all ranks have the same rows, and each takes some of them
        own_AKD = own_KD.to(z_AND.dtype).unflatten(1, (VIEWS, -1)).transpose(0, 1)
        return sinkhorn(scores_ANP, epsilon, self.prototypes(own_AKD), self.queue.is_full)

    def after_backward(self, progress: Progress) -> None:
        if progress.epoch < self._options.freeze_epochs:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Prototypes back to unit length; the step's embeddings, all views of an image in a row, into the queue."""
        self.prototypes.normalise(good)
        if self.queue is not None:
            self.queue.enqueue(gather_rows(carry[0]), good)
