"""The options of HiCLR (arXiv 2211.13466)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.moco import KeyOptions
from fasttrain.system.options import Positive
from fasttrain.views.spec import RECIPES, Recipe, ViewSpec

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.hiclr import HiCLR

# The paper's views are of skeletons: as its host draws them, with more distortions, and with parts left out. A reading
# for images: MoCo v2's, those with SimCLR's colours and solarisation, and these with smaller crops, too. Each is drawn
# anew, as in its code (JHang2020/HiCLR: feeder/ntu_feeder.py).
_BASIC = RECIPES["mocov2"][0]
_STRONG: ViewSpec = replace(_BASIC, jitter=(0.8, 0.8, 0.8, 0.2), solarize_p=0.2)
_STRONGEST: ViewSpec = replace(_STRONG, scale=(0.08, 1.0))


@dataclass(frozen=True)
class HiCLROptions(KeyOptions):
    """HiCLR (arXiv 2211.13466), in a reading for images: MoCo whose views grow stronger step by step. The weakest query
    is contrasted with its key, each stronger one is to see the same similarities as the one before it."""

    views: ClassVar[Recipe] = (_BASIC, _STRONG, _STRONGEST, _BASIC)
    # MoCo v2's: the paper has skeletons alone
    paper: ClassVar = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_norm": "split"}
    presets: ClassVar = {
        "imagenet100": {"ema": 0.99},
        "stl10": {"ema": 0.99},
        "cifar10": {
            "lr": 0.03, "weight_decay": 5e-4, "queue_size": 4096, "ema": 0.99, "temperature": 0.1, "blur": (0.0,),
        },
        "demo": {
            "epochs": 16, "warmup_epochs": 1.0, "lr": 0.12, "weight_decay": 5e-4, "queue_size": 2048, "ema": 0.99,
            "temperature": 0.1,
        },
    }  # fmt: skip

    temperature: Positive[float] = 0.2
    """Temperature of InfoNCE, and of the distributions that stronger views are to share."""

    def build(self, encoder: nn.Module, width: int) -> HiCLR:
        from fasttrain.methods.hiclr import HiCLR
        from fasttrain.networks.heads import mlp_head

        return HiCLR(encoder, mlp_head(width, self.dim), self)
