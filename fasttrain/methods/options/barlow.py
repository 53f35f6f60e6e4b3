"""The options of Barlow Twins (arXiv 2103.03230)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import NotNegative, Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.barlow import Barlow

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/barlow.yaml; there is none for STL-10, which takes the same. It
# multiplies the loss by 0.1, to which LARS is blind but for vectors, beside weight decay, and where its factor is
# clipped: --vector-lr is a tenth of 1, and --weight-decay ten times its 1e-4.
IMAGENET100 = {
    "lr": 0.3, "weight_decay": 1e-3, "vector_lr": 0.1, "final_lr": 0.0, "trust": 0.02, "trust_clip": True,
    "hidden": 2048, "dim": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class BarlowOptions(MethodOptions):
    """Barlow Twins (arXiv 2103.03230): each of an embedding's numbers is to agree with itself in the other view and be
    uncorrelated with all others. It needs neither negatives nor a momentum network, but wide embeddings."""

    views: ClassVar[Recipe] = RECIPES["byol"]
    over_batch: ClassVar[bool] = True
    # facebookresearch/barlowtwins: main.py, where biases and norms have a learning rate of 0.0048 (and, on W processes,
    # 1/W of the gradient, to which LARS is blind elsewhere)
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 2048, "epochs": 1000, "optimizer": "lars", "lr": 0.2, "vector_lr": 0.024,
        "weight_decay": 1e-6, "warmup_epochs": 10, "final_lr": 1e-3,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/barlow.yaml
        "cifar10": {**IMAGENET100, "batch_size": 256, "recipe": "cifar-asymmetric"},
        "demo": {
            "batch_size": 64, "optimizer": "sgd", "lr": 0.5, "weight_decay": 5e-4, "vector_lr": 1.0, "epochs": 24,
            "warmup_epochs": 1, "recipe": "mocov2", "hidden": 512, "dim": 512, "redundancy_weight": 0.001,
        },
    }  # fmt: skip

    dim: Positive[int] = 8192
    """Width of the embeddings whose correlations are compared."""
    hidden: Positive[int] = 8192
    """Width of the projector's two hidden layers."""
    redundancy_weight: NotNegative[float] = 0.0051
    """Weight of the correlations of different numbers, which are to be 0."""

    def build(self, encoder: nn.Module, width: int) -> Barlow:
        from fasttrain.methods.barlow import Barlow

        return Barlow(encoder, width, self)
