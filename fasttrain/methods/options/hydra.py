"""The options of Hydra (arXiv 2410.18200)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.methods.options.simclr import SimCLROptions
from fasttrain.system.options import Positive
from fasttrain.views.spec import Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.hydra import Hydra


@dataclass(frozen=True)
class HydraOptions(MethodOptions):
    """Hydra (arXiv 2410.18200), which needs labels: images of two different classes are positives, in those numbers of
    their embeddings that a learned gate of the pair of classes leaves open. Pairs are drawn anew at every step."""

    views: ClassVar[Recipe] = SimCLROptions.views
    needs_labels: ClassVar[bool] = True
    over_batch: ClassVar[bool] = True
    paper: ClassVar = SimCLROptions.paper  # the paper's own are known for CIFAR-10 alone
    presets: ClassVar = {
        # SimCLR's, with the head as it is
        "imagenet100": {"lr": 0.3, "weight_decay": 1e-4, "trust": 0.02, "trust_clip": True, "classes": 100},
        "stl10": {"lr": 0.3, "weight_decay": 1e-4, "trust": 0.02, "trust_clip": True, "classes": 10},
        # Adam at 1e-3 for 50 epochs; of batch and weight decay nothing is known
        "cifar10": {
            "recipe": "cifar", "batch_size": 256, "epochs": 50, "warmup_epochs": 0.0, "optimizer": "adamw", "lr": 1e-3,
            "weight_decay": 1e-4, "hidden": 512, "classes": 10,
        },
        "demo": {  # by SupCon's SGD, gates of so short a run stay as they begin
            "epochs": 24, "warmup_epochs": 1.0, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-4, "hidden": 512,
            "classes": 10,
        },
    }  # fmt: skip

    classes: Positive[int] = 1000
    """Rows of the table of classes. A label takes the row that it is modulo this number, so of more classes some share
    one; what is a positive goes by the labels themselves."""
    dim: Positive[int] = 256
    """Width of what the loss compares, and of gates."""
    hidden: Positive[int] = 2048
    """Hidden width of the projection head."""
    temperature: Positive[float] = 0.1
    """Temperature of the contrast."""

    def build(self, encoder: nn.Module, width: int) -> Hydra:
        from fasttrain.methods.hydra import Hydra

        return Hydra(encoder, width, self)
