"""The options of BYOL (arXiv 2006.07733)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.byol import BYOL

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/byol.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {
    "lr": 0.5, "weight_decay": 1e-6, "trust": 0.02, "trust_clip": True, "ema": 0.99, "predictor_hidden": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class BYOLOptions(MethodOptions):
    """BYOL (arXiv 2006.07733): from each view, predict the projection that a momentum network makes of the other. There
    are no negatives; the defaults are those of the paper's 1000 epochs."""

    views: ClassVar[Recipe] = RECIPES["byol"]
    # section 3.3, and google-deepmind/deepmind-research: byol/configs/byol.py, which for 100 epochs has --lr 0.45, for
    # 300 --lr 0.3, and --weight-decay 1e-6 and --ema 0.99 for both
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 4096, "epochs": 1000, "optimizer": "lars", "lr": 0.2,
        "weight_decay": 1.5e-6, "warmup_epochs": 10,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/byol.yaml
        "cifar10": {
            "batch_size": 256, "epochs": 1000, "lr": 1.0, "weight_decay": 1e-5, "trust": 0.02, "trust_clip": True,
            "ema": 0.99, "recipe": "cifar-asymmetric",
        },
        "demo": {
            "optimizer": "sgd", "lr": 0.5, "weight_decay": 5e-4, "epochs": 12, "warmup_epochs": 1, "ema": 0.9,
            "hidden": 512, "predictor_hidden": 512, "recipe": "mocov2",
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of projections and predictions."""
    hidden: Positive[int] = 4096
    """Width of the projector's hidden layer."""
    predictor_hidden: Positive[int] = 4096
    """Width of the predictor's hidden layer."""
    ema: Momentum[float] = 0.996
    """Momentum of the momentum network at the start; it rises to 1."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> BYOL:
        from fasttrain.methods.byol import BYOL

        return BYOL(encoder, width, self)
