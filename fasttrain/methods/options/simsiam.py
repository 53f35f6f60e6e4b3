"""The options of SimSiam (arXiv 2011.10566)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.simsiam import SimSiam

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/simsiam.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {"lr": 0.5, "weight_decay": 1e-5, "warmup_epochs": 10, "recipe": "byol"}


@dataclass(frozen=True)
class SimSiamOptions(MethodOptions):
    """SimSiam (arXiv 2011.10566): from each view, predict the projection that the same network makes of the other,
    through which no gradient flows. There are no negatives, and no momentum network."""

    views: ClassVar[Recipe] = RECIPES["mocov2"]
    # facebookresearch/simsiam: main_simsiam.py and README.md
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 512, "epochs": 100, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # the paper's appendix D
        "cifar10": {
            "batch_size": 512, "epochs": 800, "lr": 0.03, "weight_decay": 5e-4, "projector_layers": 2, "blur": (0.0,),
        },
        "demo": {
            "lr": 0.25, "weight_decay": 5e-4, "epochs": 12, "hidden": 512, "dim": 512, "predictor_hidden": 128,
        },
    }  # fmt: skip

    dim: Positive[int] = 2048
    """Width of projections and predictions."""
    hidden: Positive[int] = 2048
    """Width of the projector's hidden layers."""
    projector_layers: Positive[int] = 3
    """Linear layers of the projector, each with batch norm."""
    predictor_hidden: Positive[int] = 512
    """Width of the predictor's hidden layer."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> SimSiam:
        from fasttrain.methods.simsiam import SimSiam

        return SimSiam(encoder, width, self)
