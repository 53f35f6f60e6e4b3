"""The options of SwAV (arXiv 2006.09882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import NotNegative, Positive, Several, With
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.swav import SwAV


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
    queue_epoch: Annotated[NotNegative[float], With("queue_size")] = 15.0
    """Epoch from which they do."""

    def build(self, encoder: nn.Module, width: int) -> SwAV:
        from fasttrain.methods.swav import SwAV

        return SwAV(encoder, width, self)
