"""SCE (arXiv 2111.14585): InfoNCE whose target shares its weight between the positive and keys that are like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fasttrain.methods.options.moco import KeyOptions
from fasttrain.system.options import Fraction, Momentum, Positive, With
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.moco import MoCo

_CIFAR = {
    "recipe": "weak-key", "optimizer": "sgd", "weight_decay": 5e-4, "batch_norm": "split", "head": "cifar",
    "symmetric": False, "dim": 128, "hidden": 512, "ema_end": None, "key_temperature": 0.05,
}  # fmt: skip
# No public ones are known: MoCo v3's of solo-learn's scripts/pretrain/imagenet-100, whose networks are alike
_IMAGENET100 = {"trust": 0.02, "trust_clip": True}


@dataclass(frozen=True)
class SCEOptions(KeyOptions):
    """SCE (arXiv 2111.14585): MoCo's contrast, but that negatives share in the target by how similar the key is to
    them. It is InfoNCE for the one part, ReSSL for the other."""

    views: ClassVar[Recipe] = RECIPES["mocov3"]
    # CEA-LIST/SCE: sce/configs/run/pretrain/sce/resnet50/resnet50_imagenet.yaml, which decays biases and norms, too
    paper: ClassVar = {
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10, "epochs": 200, "batch_size": 4096,
        "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _IMAGENET100,
        "stl10": _IMAGENET100,
        # CEA-LIST/SCE: sce/configs/run/pretrain/sce/resnet18/resnet18_cifar10.yaml, whose weak view is the key's
        "cifar10": {**_CIFAR, "lr": 0.06, "warmup_epochs": 5, "batch_size": 256, "queue_size": 4096},
        "demo": {**_CIFAR, "lr": 0.12, "warmup_epochs": 1, "queue_size": 2048},
    }

    dim: Positive[int] = 256
    """Width of queries and keys."""
    head: Literal["imagenet", "cifar"] = "imagenet"
    """Three layers with batch norm and a predictor for queries, or two layers and none: the paper's for either."""
    hidden: Positive[int] = 2048
    """Width of the projector's hidden layers."""
    predictor_hidden: Annotated[Positive[int], With("head", ("imagenet",))] = 4096
    """Width of the predictor's hidden layer."""
    symmetric: bool = True
    """Each view is query and key in turn: the mean of both directions."""
    ema: Momentum[float] = 0.99
    """Momentum of the key encoder at the start."""
    ema_end: Fraction[float | None] = 1.0
    """What that momentum rises to, along half a cosine. None: the same throughout."""
    temperature: Positive[float] = 0.1
    """Temperature of the query's distribution."""
    key_temperature: Positive[float] = 0.07
    """Temperature of the key's distribution over the queue."""
    positive_weight: Fraction[float] = 0.5
    """Weight of the positive in the target; 1: InfoNCE."""

    def build(self, encoder: nn.Module, width: int) -> MoCo:
        from fasttrain.losses.queue import SCE
        from fasttrain.methods.moco import MoCo
        from fasttrain.networks.heads import batch_norm_mlp

        contrast = SCE(self.temperature, self.key_temperature, self.positive_weight)
        if self.head == "cifar":
            projector = batch_norm_mlp(width, (self.hidden,), self.dim, "bias")
            return MoCo(encoder, projector, contrast, self, self.symmetric)
        projector = batch_norm_mlp(width, (self.hidden, self.hidden), self.dim, "norm")
        predictor = batch_norm_mlp(self.dim, (self.predictor_hidden,), self.dim)
        return MoCo(encoder, projector, contrast, self, self.symmetric, predictor)
