"""The options of BaCon's self-balanced contrast (arXiv 2310.01376)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.methods.options.simclr import SimCLROptions
from fasttrain.system.options import NotNegative, Positive, Several
from fasttrain.views.spec import Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.bacon import BaCon

_CLASSES = {"imagenet100": 100, "stl10": 10, "cifar10": 10, "demo": 10}


@dataclass(frozen=True)
class BaConOptions(MethodOptions):
    """The self-balanced contrast of BaCon (arXiv 2310.01376) without labels, beside SimCLR: images are positives of
    each other as far as learned prototypes put them into one class. For few classes, or unequally frequent ones."""

    # SimCLR's, whose networks and views these are. The paper's own are for sets of which some classes have labels.
    views: ClassVar[Recipe] = SimCLROptions.views
    over_batch: ClassVar[bool] = True
    paper: ClassVar = SimCLROptions.paper
    presets: ClassVar = {
        name: {**SimCLROptions.presets[name], "prototypes": classes} for name, classes in _CLASSES.items()
    }

    dim: Positive[int] = 128
    """Width of what the losses compare, and of prototypes."""
    hidden: Positive[int] = 2048
    """Hidden width of the projection head."""
    temperature: Positive[float] = 0.1
    """Temperature of both contrasts."""
    prototypes: Several[int] = 1000
    """Prototypes, one for each class that is expected."""
    balanced_weight: NotNegative[float] = 0.35
    """Weight of the self-balanced contrast at the end of the run, to which it grows from 0, beside NT-Xent's 1."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> BaCon:
        from fasttrain.methods.bacon import BaCon

        return BaCon(encoder, width, self)
