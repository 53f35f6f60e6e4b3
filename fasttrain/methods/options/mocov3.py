"""The options of MoCo v3 (arXiv 2104.02057)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.mocov3 import MoCoV3

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/mocov3.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {"trust": 0.02, "trust_clip": True, "temperature": 0.2, "recipe": "byol"}


@dataclass(frozen=True)
class MoCoV3Options(MethodOptions):
    """MoCo v3 (arXiv 2104.02057): InfoNCE of each view's prediction against a momentum network's keys of the other, the
    batch's other images as negatives. The defaults are those of the paper's 300 epochs."""

    views: ClassVar[Recipe] = RECIPES["mocov3"]
    over_batch: ClassVar[bool] = True
    # facebookresearch/moco-v3: CONFIG.md and main_moco.py, which for 100 epochs have --lr 0.6, and for 1000
    # --weight-decay 1.5e-6 and --ema 0.996
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 4096, "epochs": 300, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6,
        "warmup_epochs": 10,
    }  # fmt: skip
    paper_vit: ClassVar = {
        "optimizer": "adamw", "lr": 1.5e-4, "weight_decay": 0.1, "decay": "all", "warmup_epochs": 40,
        "temperature": 0.2, "crop_scale": (0.08, 1.0), "vit_heads": 12,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/mocov3.yaml
        "cifar10": {**IMAGENET100, "batch_size": 256, "epochs": 1000, "recipe": "cifar-asymmetric"},
        "demo": {
            "optimizer": "sgd", "lr": 0.25, "weight_decay": 5e-4, "epochs": 12, "warmup_epochs": 1, "temperature": 0.2,
            "ema": 0.9, "hidden": 512, "predictor_hidden": 512,
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of queries and keys."""
    hidden: Positive[int] = 4096
    """Width of the projector's hidden layers: one, and two for a vision transformer."""
    predictor_hidden: Positive[int] = 4096
    """Width of the predictor's hidden layer."""
    ema: Momentum[float] = 0.99
    """Momentum of the momentum network at the start; it rises to 1."""
    temperature: Positive[float] = 1.0
    """Temperature of InfoNCE."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> MoCoV3:
        from fasttrain.methods.mocov3 import MoCoV3

        return MoCoV3(encoder, width, self)
