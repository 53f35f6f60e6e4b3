"""The options of SimCLR (arXiv 2002.05709)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.errors import UserError
from fasttrain.system.options import NotNegative, Positive, With
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.simclr import SimCLR

# solo-learn: scripts/pretrain/imagenet-100/simclr.yaml, whose head has no batch norm
_SOLO = {
    "lr": 0.3, "weight_decay": 1e-4, "trust": 0.02, "trust_clip": True, "hidden": 4096, "dim": 512, "temperature": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class SimCLROptions(MethodOptions):
    """SimCLR (arXiv 2002.05709): the two views of an image are each other's positives, all other views of the batch
    their negatives. Large batches are what it needs; --decoupled makes it need them less."""

    views: ClassVar[Recipe] = RECIPES["simclr"]
    over_batch: ClassVar[bool] = True
    # the paper's section 2.2; the command in google-research/simclr's README.md now has a weight decay of 1e-4
    paper: ClassVar = {
        "batch_size": 4096, "epochs": 100, "warmup_epochs": 10.0, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6,
        "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _SOLO,
        "stl10": _SOLO,  # there is no other recipe for it
        # google-research/simclr: README.md, its command for CIFAR-10; the head is as wide as the features
        "cifar10": {
            "recipe": "cifar", "epochs": 1000, "lr": 1.0, "weight_decay": 1e-4, "hidden": 512, "temperature": 0.5,
        },
        "demo": {
            "epochs": 12, "warmup_epochs": 0.0, "optimizer": "sgd", "lr": 0.12, "weight_decay": 5e-4, "hidden": 512,
            "temperature": 0.2,
        },
    }  # fmt: skip

    dim: Positive[int] = 128
    """Width of what the loss compares."""
    hidden: Positive[int] = 2048
    """Hidden width of the projection head."""
    temperature: Positive[float] = 0.1
    """Temperature of NT-Xent."""
    decoupled: bool = False
    """Leave a view's positive out of NT-Xent's denominator: the decoupled contrastive loss (arXiv 2110.06848)."""
    decoupled_weighted: bool = False
    """The same paper's DCLW: decoupled, and pairs that are far apart weigh more."""
    communities: NotNegative[int] = 0
    """Communities of images that are found in the batch and contrasted with, as gCooL does (arXiv 2110.14863, which has
    10). 0: none."""
    community_weight: Annotated[NotNegative[float], With("communities")] = 0.1
    """Weight of that contrast, which grows from 0 at first to 0.86 of this at the end of the run."""
    learnt_augmentation: NotNegative[float] = 0.0
    """Weight, for the encoder, of a contrast with views that a small network learns to make in feature space (MCLRec,
    arXiv 2304.07763, which has 0.05 to 0.1). 0: there is no such network."""
    anchor: str = ""
    """An earlier run whose encoder stays frozen beside this one, which is to separate images by a margin more than that
    one does (DBL, arXiv 2404.18114): a run or weights, as for --init. Empty: none."""
    anchor_weight: Annotated[NotNegative[float], With("anchor")] = 1.0
    """Weight of those margins, on the encoder's output."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.communities == 1:
            raise UserError("--communities 1 has nothing to be told from: give 2 or more, or 0 for none")

    @property
    def anchored_to(self) -> str:
        return self.anchor

    def build(self, encoder: nn.Module, width: int) -> SimCLR:
        from fasttrain.methods.simclr import SimCLR

        return SimCLR(encoder, width, self)
