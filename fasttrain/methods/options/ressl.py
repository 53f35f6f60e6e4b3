"""ReSSL (arXiv 2107.09282): a strong view keeps the relations that a weak view has to the queue. No positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fasttrain.methods.options.moco import KeyOptions
from fasttrain.system.options import Positive, Several
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.moco import MoCo

# solo-learn's scripts/pretrain/imagenet-100/ressl.yaml, but for its SyncBN, where keys are not shuffled
_IMAGENET100 = {
    "crop_scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1), "lr": 0.3, "decay": "auto", "warmup_epochs": 10,
    "dim": 256, "queue_size": 65536, "ema": 0.99, "ema_end": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class ReSSLOptions(KeyOptions):
    """ReSSL (arXiv 2107.09282): a strongly augmented view is to be as similar to a queue of other images as a weakly
    augmented one is by the momentum encoder. There is no positive; what keeps features apart is that the latter's
    similarities are sharpened."""

    views: ClassVar[Recipe] = RECIPES["weak-key"]
    # the authors' repository, mingkai-zheng/ReSSL: ressl.py, network/ressl.py, network/head.py
    paper: ClassVar = {
        "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4, "decay": "matrices", "warmup_epochs": 5, "epochs": 200,
        "batch_size": 256, "batch_norm": "split",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _IMAGENET100,
        "stl10": _IMAGENET100,  # no public ones are known
        # solo-learn's scripts/pretrain/cifar/ressl.yaml, with the same exception
        "cifar10": {**_IMAGENET100, "lr": 0.05, "batch_size": 256, "epochs": 1000},
        "demo": {"lr": 0.12, "warmup_epochs": 1, "hidden": 512, "dim": 128, "queue_size": 2048, "ema": 0.99},
    }  # fmt: skip

    dim: Positive[int] = 512
    """Width of queries and keys."""
    hidden: Positive[int] = 4096
    """Width of the projector's hidden layer."""
    queue_size: Several[int] = 131072
    """Keys kept to relate to."""
    temperature: Positive[float] = 0.1
    """Temperature of the query's distribution over the queue."""
    key_temperature: Positive[float] = 0.04
    """Temperature of the key's, which must be lower: it is what keeps features from becoming all alike."""

    def build(self, encoder: nn.Module, width: int) -> MoCo:
        from fasttrain.losses.queue import ReSSL
        from fasttrain.methods.moco import MoCo
        from fasttrain.networks.heads import mlp_head

        projector = mlp_head(width, self.dim, self.hidden)
        return MoCo(encoder, projector, ReSSL(self.temperature, self.key_temperature), self)
