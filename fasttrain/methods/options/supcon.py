"""The options of SupCon (arXiv 2004.11362)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Positive
from fasttrain.views.spec import RECIPES, Recipe, adjusted

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.supcon import SupCon

# solo-learn: scripts/pretrain/imagenet-100/supcon.yaml. Its loss has the sum over positives inside the logarithm, and
# no factor: at a temperature of 0.2 ours is 2.86 times as large, so --lr is its 0.5 over that, and --weight-decay its
# 1e-5 times that.
_SOLO = {"recipe": "simclr", "lr": 0.175, "weight_decay": 2.86e-5, "hidden": 2048, "dim": 512, "temperature": 0.2}


@dataclass(frozen=True)
class SupConOptions(MethodOptions):
    """SupCon (arXiv 2004.11362): supervised contrast, which needs labels. All views of the batch that show one class
    are each other's positives, the others their negatives; the loss is L_out, times τ/0.07 as in its code."""

    # Views and settings of HobbitLong/SupContrast (README.md, main_supcon.py): its command, which is for CIFAR-10 with
    # a ResNet-50. There is none for ImageNet.
    views: ClassVar[Recipe] = adjusted(RECIPES["mocov2"], blur_p=0.0)
    needs_labels: ClassVar[bool] = True
    over_batch: ClassVar[bool] = True
    paper: ClassVar = {
        "batch_size": 1024, "epochs": 1000, "warmup_epochs": 10.0, "optimizer": "sgd", "lr": 0.125,
        "weight_decay": 1e-4, "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _SOLO,
        "stl10": _SOLO,  # there is no other recipe for it
        "cifar10": {"hidden": 512},  # as wide as the features of that ResNet-18
        # at twice the rate without a warm-up all rows fell together
        "demo": {"epochs": 12, "warmup_epochs": 2.0, "lr": 0.06, "hidden": 512},
    }

    dim: Positive[int] = 128
    """Width of what the loss compares."""
    hidden: Positive[int] = 2048
    """Hidden width of the projection head."""
    temperature: Positive[float] = 0.1
    """Temperature of the contrast."""

    def build(self, encoder: nn.Module, width: int) -> SupCon:
        from fasttrain.methods.supcon import SupCon

        return SupCon(encoder, width, self)
