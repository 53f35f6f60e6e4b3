"""The options of SepCLR (arXiv 2402.11928)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.errors import UserError
from fasttrain.system.options import NotNegative, Positive
from fasttrain.views.spec import RECIPES, Recipe, adjusted

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.sepclr import SepCLR


@dataclass(frozen=True)
class SepCLROptions(MethodOptions):
    """SepCLR (arXiv 2402.11928), which needs labels that tell background images from targets: one encoder learns what
    all images have in common, a second one what targets alone have. What an image of the background has is no part of
    the second."""

    # Views and settings of neurospin-projects/2024_rlouiset_sep_clr: cifar_mnist/, for CIFAR-10 with digits in it and a
    # ResNet-18. There is none for ImageNet. Its Adam has no weight decay, and a rate that stays.
    views: ClassVar[Recipe] = adjusted(RECIPES["mocov2"], blur_p=0.0)
    needs_labels: ClassVar[bool] = True
    over_batch: ClassVar[bool] = True
    paper: ClassVar = {
        "batch_size": 512, "epochs": 250, "optimizer": "adamw", "lr": 1.5e-4, "weight_decay": 0.0, "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": {"batch_size": 512, "epochs": 250},
        "stl10": {"batch_size": 512, "epochs": 250},
        "cifar10": {},
        "demo": {"epochs": 12, "warmup_epochs": 1.0, "lr": 1e-3},
    }

    background: NotNegative[tuple[int, ...]] = ()
    """Numbers of the classes whose images are background; those of all others are targets. Classes are numbered from 0
    in the order of their names."""
    evaluated: Literal["salient", "common"] = "salient"
    """Encoder that is evaluated and exported."""
    dim: Positive[int] = 32
    """Width of what the losses compare, for each encoder."""
    hidden: Positive[int] = 128
    """Hidden width of both projection heads."""
    temperature: Positive[float] = 0.5
    """Two embeddings at squared distance d are alike by exp(-d / (2 temperature))."""
    salient_weight: NotNegative[float] = 1000.0
    """Weight of what the salient encoder learns from alone, next to 1 for the common one's and 10 for what keeps them
    apart. For an optimizer that adapts its steps; with sgd, begin at 1."""

    def build(self, encoder: nn.Module, width: int) -> SepCLR:
        if not self.background:
            raise UserError(
                "--method sepclr needs --background: the numbers of the classes that are background, such as 0 for the "
                "first by name"
            )
        from fasttrain.methods.sepclr import SepCLR

        return SepCLR(encoder, width, self)
