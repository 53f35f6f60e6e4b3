"""The options of CACR with a queue (arXiv 2105.03746)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.moco import KeyOptions
from fasttrain.system.options import NotNegative, Positive, Several
from fasttrain.views.spec import RECIPES, Recipe, repeated

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.cacr_queue import CACRQueue


@dataclass(frozen=True)
class CACRQueueOptions(KeyOptions):
    """CACR (arXiv 2105.03746) with MoCo's networks: the keys of an image's other views attract its query, the more the
    further away they are, and a queue repels it, its nearest keys most. One view takes a gradient, the others none."""

    views: ClassVar[Recipe] = RECIPES["mocov2"][:1]
    # JegZheng/CACR-SSL: large_scale_shift_experiments/README.md, where every view is a query in turn
    paper: ClassVar = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_norm": "split"}
    presets: ClassVar = {
        "imagenet100": {"ema": 0.99},
        "stl10": {"ema": 0.99},
        # MoCo's own for these images, with the negatives' sharpness of the form without a queue
        "cifar10": {
            "recipe": "cifar", "lr": 0.03, "weight_decay": 5e-4, "queue_size": 4096, "ema": 0.99,
            "negative_sharpness": 0.9,
        },
        "demo": {"epochs": 20, "lr": 0.3, "weight_decay": 5e-4, "queue_size": 2048, "ema": 0.99, "num_views": 3},
    }  # fmt: skip

    num_views: Several[int] = 5
    """Views of each image, all drawn alike: a query, and keys that are its positives."""
    sharpness: NotNegative[float] = 1.0
    """How much more a positive weighs that is further away: their weights are softmax(t · squared distance)."""
    negative_sharpness: Positive[float] = 2.0
    """How much more a negative weighs that is nearer: softmax(−t · squared distance)."""

    @property
    def all_views(self) -> Recipe:
        return repeated(self.views, self.num_views)

    def build(self, encoder: nn.Module, width: int) -> CACRQueue:
        from fasttrain.methods.cacr_queue import CACRQueue
        from fasttrain.networks.heads import mlp_head

        return CACRQueue(encoder, mlp_head(width, self.dim), self)
