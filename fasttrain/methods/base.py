"""The contract between a method and everything else.

A method is networks and named loss terms, composed. Everything it keeps from step to step is a parameter or a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fasttrain.kernels.augment import Views
from fasttrain.system.options import Options
from fasttrain.views.spec import Recipe


class Sample(NamedTuple):
    """What a method sees of a micro-batch.

    views: a tensor (V, B, 3, S, S) for each size, as the method's recipe has them; `views[0][v]` and
    `views[0].flatten(0, 1)` are channels-last without a copy. label_B: int64, beside the views,
    only where `needs_labels`. index_B: int64, place in the data set, on the CPU.
    """

    views: Views
    label_B: Tensor | None
    index_B: Tensor


class Output(NamedTuple):
    """What a method makes of a micro-batch.

    loss: scalar, fp32. terms: detached scalars by name, a curve each. carry: what `update` needs, such as new keys:
    tensors of rows, those of a step's micro-batches put together along dimension 0.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    carry: tuple[Tensor, ...] = ()


class Method(nn.Module):
    """Networks and a loss. `encoder` and `projector` are what is evaluated and exported."""

    encoder: nn.Module
    projector: nn.Module

    def forward(self, sample: Sample) -> Output:
        """Loss and terms of one micro-batch. "Batch" in a loss is the global batch, whatever the number of ranks."""
        raise NotImplementedError

    def after_backward(self) -> None:
        """Before the optimizer, once gradients are complete: what changes them, such as frozen prototypes."""

    def update(self, good: Tensor, part: float, carry: tuple[Tensor, ...]) -> None:
        """After the optimizer, once a step: momentum encoder, queue, centres.

        good: 0-dim bool on the device; where it is false nothing may change, and the host must not look. part: of the
        run that is done, 0…1. carry: see Output.
        """


@dataclass(frozen=True)
class MethodOptions(Options):
    """A method's own options; their defaults are its paper's."""

    views: ClassVar[Recipe]
    """The views it needs: how many of each size, and how they are drawn where no other recipe is asked for."""
    needs_labels: ClassVar[bool] = False
    paper: ClassVar[Mapping[str, Any]] = {}
    """Its paper's values of options that all methods have."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By preset: other values, of its own options and of those that all methods have."""

    def build(self, encoder: nn.Module, width: int) -> Method:
        """The method around a query encoder (N, 3, S, S) → (N, width)."""
        raise NotImplementedError
