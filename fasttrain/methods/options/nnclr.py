"""The options of NNCLR (arXiv 2104.14548)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import Regularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.nnclr import NNCLR

# solo-learn's scripts/pretrain/imagenet-100/nnclr.yaml
_IMAGENET100 = {
    "lr": 0.4, "weight_decay": 1e-5, "trust": 0.02, "trust_clip": True, "temperature": 0.2, "queue_size": 65536,
}  # fmt: skip


@dataclass(frozen=True)
class NNCLROptions(MethodOptions):
    """NNCLR (arXiv 2104.14548): the nearest neighbour of an image's one view has to tell the prediction of its other
    view from those of other images. Neighbours are looked up in a queue of earlier images."""

    views: ClassVar[Recipe] = RECIPES["byol"]
    over_batch: ClassVar[bool] = True
    # VISSL's reproduction: configs/config/pretrain/nnclr/nnclr_8node_resnet.yaml
    paper: ClassVar = {
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10, "epochs": 1000, "batch_size": 4096,
        "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _IMAGENET100,
        "stl10": _IMAGENET100,  # no public ones are known
        "cifar10": {**_IMAGENET100, "recipe": "cifar-asymmetric", "batch_size": 256},  # …/cifar/nnclr.yaml
        "demo": {
            **_IMAGENET100, "epochs": 12, "warmup_epochs": 1, "hidden": 512, "predictor_hidden": 512, "dim": 128,
            "queue_size": 2048,
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of embeddings and predictions."""
    hidden: Positive[int] = 2048
    """Width of the projector's two hidden layers."""
    predictor_hidden: Positive[int] = 4096
    """Width of the predictor's hidden layer."""
    queue_size: Positive[int] = 98304
    """Embeddings of earlier images that neighbours are looked up in."""
    temperature: Positive[float] = 0.1
    """Temperature of the contrast."""
    decoupled: bool = False
    """Leave the own term out of the denominator: the decoupled contrastive loss (arXiv 2110.06848)."""
    decoupled_weighted: bool = False
    """The same paper's DCLW: decoupled, and pairs that are far apart weigh more."""
    regularisers: Regularisers = field(default_factory=Regularisers)
    """XMoCo's regularisers, of predictions with the other view's embeddings as keys"""

    def build(self, encoder: nn.Module, width: int) -> NNCLR:
        from fasttrain.methods.nnclr import NNCLR

        return NNCLR(encoder, width, self)
