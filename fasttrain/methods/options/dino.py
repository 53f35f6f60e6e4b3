"""The options of DINO (arXiv 2104.14294)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import Momentum, NotNegative, Positive, Several
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.dino import DINO


@dataclass(frozen=True)
class DINOOptions(MethodOptions):
    """DINO (arXiv 2104.14294): all views of an image, small crops among them, predict the probabilities that a momentum
    encoder gives to the views of full size. That encoder, the teacher, is what is evaluated."""

    views: ClassVar[Recipe] = RECIPES["dino"]
    # main_dino.py of facebookresearch/dino, and its README's command for ResNet-50
    paper: ClassVar = {
        "batch_size": 1024, "epochs": 100, "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "decay": "matrices",
        "warmup_epochs": 10.0, "batch_norm": "sync",
    }  # fmt: skip
    # The paper's section "Implementation details"; the learning rate ends at 1e-6.
    paper_vit: ClassVar = {
        "recipe": "dino-vit", "optimizer": "adamw", "lr": 5e-4, "final_lr": 5e-4, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "vit_positions": "learned", "drop_path": 0.1,
    }  # fmt: skip
    # scripts/pretrain/imagenet-100/dino.yaml and cifar/dino.yaml of vturrisi/solo-learn; it has none for STL-10
    _solo: ClassVar = {
        "batch_size": 256, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "trust": 0.02, "trust_clip": True,
        "prototypes": 4096, "ema": 0.9995, "teacher_temperature": 0.07, "clip_each": 0.0,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": {**_solo, "recipe": "byol", "teacher_warmup_epochs": 50.0},
        "stl10": {**_solo, "recipe": "byol", "teacher_warmup_epochs": 50.0},
        "cifar10": {**_solo, "recipe": "cifar-asymmetric", "epochs": 1000},
        # Without batch norm in the head so short a run ends where all images have the same probabilities
        "demo": {
            "epochs": 20, "lr": 0.2, "weight_decay": 5e-4, "warmup_epochs": 1.0, "dim": 64, "hidden": 512,
            "head_norm": True, "prototypes": 512, "ema": 0.97, "freeze_epochs": 5.0,
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of embeddings and prototypes."""
    hidden: Positive[int] = 2048
    """Width of the projection head's two hidden layers."""
    head_norm: bool = False
    """Batch norm in the projection head: faster at first, for small data and short runs."""
    prototypes: Several[int] = 65536
    """Width of the probabilities."""
    ema: Momentum[float] = 0.996
    """Momentum of the teacher at first; it rises to 1. 0.9995 for batches of 256."""
    temperature: Positive[float] = 0.1
    """Temperature of the predictions."""
    teacher_temperature: Positive[float] = 0.04
    """Temperature of the teacher; 0.07 with a warm-up for longer training."""
    teacher_warmup_epochs: NotNegative[float] = 0.0
    """Epochs in which the teacher's temperature goes there from 0.04; 30 in the paper."""
    freeze_epochs: NotNegative[float] = 1.0
    """Epochs at first in which prototypes do not move."""
    clip_each: NotNegative[float] = 3.0
    """Gradients of a parameter of a larger norm are scaled down to this, each by itself. 0: never."""

    def build(self, encoder: nn.Module, width: int) -> DINO:
        from fasttrain.methods.dino import DINO

        return DINO(encoder, width, self)
