"""The options of VICReg (arXiv 2105.04906)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import NotNegative, Positive
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.vicreg import VICReg

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/vicreg.yaml; there is none for STL-10, which takes the same. Its
# variance term is the sum over views, ours the mean: its weight of 25 is 50 here.
IMAGENET100 = {
    "lr": 0.3, "weight_decay": 1e-4, "final_lr": 0.0, "trust": 0.02, "trust_clip": True, "hidden": 2048, "dim": 2048,
    "variance_weight": 50.0, "crop_scale": (0.2, 1.0), "blur": (0.5,), "solarize": (0.1,),
}  # fmt: skip


@dataclass(frozen=True)
class VICRegOptions(MethodOptions):
    """VICReg (arXiv 2105.04906): two views' embeddings agree, while within each view every number keeps its variance
    over the batch and is uncorrelated with the others. Nothing is normalised, and views share no statistics."""

    views: ClassVar[Recipe] = RECIPES["byol"]
    over_batch: ClassVar[bool] = True
    # facebookresearch/vicreg: main_vicreg.py and README.md, which for 100 epochs has --batch-size 512 and --lr 0.3
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 2048, "epochs": 1000, "optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6,
        "warmup_epochs": 10, "final_lr": 1e-3,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/vicreg.yaml
        "cifar10": {**IMAGENET100, "batch_size": 256, "recipe": "cifar-asymmetric", "blur": (0.0,)},
        "demo": {
            "batch_size": 64, "optimizer": "sgd", "lr": 1.0, "weight_decay": 5e-4, "epochs": 8, "warmup_epochs": 1,
            "recipe": "mocov2", "hidden": 512, "dim": 512,
        },
    }  # fmt: skip

    dim: Positive[int] = 8192
    """Width of the embeddings that are compared."""
    hidden: Positive[int] = 8192
    """Width of the projector's two hidden layers."""
    invariance_weight: NotNegative[float] = 25.0
    """Weight of the squared distance of the two views' embeddings."""
    variance_weight: NotNegative[float] = 25.0
    """Weight of what standard deviations fall short of 1: the mean over both views and all numbers."""
    covariance_weight: NotNegative[float] = 1.0
    """Weight of the squared covariances of different numbers."""

    def build(self, encoder: nn.Module, width: int) -> VICReg:
        from fasttrain.methods.vicreg import VICReg

        return VICReg(encoder, width, self)
