"""SwAV (arXiv 2006.09882): every view predicts to which prototypes another view of its image was assigned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.multi_crop import crop_cross_entropy, cross_entropy_terms
from fasttrain.losses.swapped import sinkhorn
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.multi_crop import encode_crops
from fasttrain.networks.prototypes import Prototypes
from fasttrain.networks.queue import Queue
from fasttrain.system.collectives import gather_rows, rank, world_size
from fasttrain.system.options import NotNegative, Positive, Several
from fasttrain.views.spec import RECIPES, Recipe

VIEWS = 2  # of full size, which assign


@dataclass(frozen=True)
class SwAVOptions(MethodOptions):
    """SwAV (arXiv 2006.09882): views of full size are assigned to prototypes, evenly over the batch, and all other
    views of the image, small crops among them, predict that. Smaller batches than 512 want --queue-size 3840."""

    views: ClassVar[Recipe] = RECIPES["swav"]
    over_batch: ClassVar[bool] = True
    # The paper's appendix A, and scripts/swav_800ep_pretrain.sh of facebookresearch/swav. Its optimizer is LARC
    # without clipping, which scales vectors, too; here they are left alone, as LARS does.
    paper: ClassVar = {
        "batch_size": 4096, "epochs": 800, "optimizer": "lars", "lr": 0.3, "final_lr": 0.001, "weight_decay": 1e-6,
        "warmup_epochs": 10.0, "batch_norm": "sync",
    }  # fmt: skip
    # scripts/pretrain/imagenet-100/swav.yaml and cifar/swav.yaml of vturrisi/solo-learn; it has none for STL-10
    _solo: ClassVar = {
        "recipe": "simclr", "batch_size": 256, "lr": 0.6, "final_lr": 0.0, "trust": 0.02, "trust_clip": True,
        "queue_size": 3840, "queue_epoch": 50.0, "freeze_epochs": 2.0,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _solo,
        "stl10": _solo,
        "cifar10": {**_solo, "epochs": 1000, "blur": (0.0,)},
        # Prototypes that are frozen and many more than the width: embeddings and prototypes can't all become equal
        "demo": {
            "epochs": 16, "optimizer": "sgd", "lr": 0.12, "weight_decay": 5e-4, "warmup_epochs": 1.0, "dim": 32,
            "hidden": 512, "prototypes": 300, "epsilon": 0.03, "freeze_epochs": 10.0,
        },
    }  # fmt: skip

    dim: Positive[int] = 128
    """Width of embeddings and prototypes."""
    hidden: Positive[int] = 2048
    """Width of the projection head's hidden layer."""
    prototypes: Several[int] = 3000
    """Prototypes, a few for each kind of image that is expected."""
    temperature: Positive[float] = 0.1
    """Temperature of the predictions."""
    epsilon: Positive[float] = 0.05
    """Weight of the assignments' entropy: the smaller, the sharper they are. 0.03 where the loss stays at the logarithm
    of --prototypes."""
    freeze_epochs: NotNegative[float] = 1.0
    """Epochs at first in which prototypes do not move."""
    queue_size: NotNegative[int] = 0
    """Older images that help to assign a batch evenly, where it has fewer images than there are prototypes. 0: none."""
    queue_epoch: NotNegative[float] = 15.0
    """Epoch from which they do."""

    def build(self, encoder: nn.Module, width: int) -> SwAV:
        return SwAV(encoder, width, self)


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
        out = self.projector(encode_crops(self.encoder, sample.views))
        with torch.autocast(out.device.type, enabled=False):
            z_VND = F.normalize(out.float(), dim=1).unflatten(0, (-1, sample.views[0].shape[1]))
            target_ANP = self._assigned(z_VND[:VIEWS].detach(), sample.progress)
            loss = crop_cross_entropy(z_VND, self.prototypes.weight, target_ANP, self._options.temperature)
            terms = cross_entropy_terms(loss, target_ANP)
        return Output(loss, terms, (z_VND[:VIEWS].detach().transpose(0, 1).flatten(1),))

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
