"""What a method's options are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fasttrain.system.options import Options
from fasttrain.views.spec import Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.base import Method


@dataclass(frozen=True)
class MethodOptions(Options):
    """A method's own options; their defaults are its paper's."""

    views: ClassVar[Recipe]
    """The views it needs: how many of each size, and how they are drawn where no other recipe is asked for."""
    needs_labels: ClassVar[bool] = False
    over_batch: ClassVar[bool] = False
    """Whether its loss compares the images of a batch, which then can't be cut into micro-batches."""
    paper: ClassVar[Mapping[str, Any]] = {}
    """Its paper's values of options that all methods have."""
    paper_vit: ClassVar[Mapping[str, Any]] = {}
    """Its paper's other values, of any option, where the encoder is a vision transformer; after those of a preset."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By preset: other values, of its own options and of those that all methods have."""

    @property
    def all_views(self) -> Recipe:
        """`views`, or what is made of them where their number is an option."""
        return self.views

    @property
    def anchored_to(self) -> str:
        """What --anchor names: the weights of the method's networks.anchor.Anchor, from wherever --init has its own.
        Empty: it has no such network."""
        return ""

    def build(self, encoder: nn.Module, width: int) -> Method:
        """The method around a query encoder (N, 3, S, S) → (N, width)."""
        raise NotImplementedError
