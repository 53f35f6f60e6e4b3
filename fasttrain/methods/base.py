"""The contract between a method and everything else.

A method is networks and named loss terms, composed. Everything it keeps from step to step is a parameter or a buffer.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from fasttrain.kernels.augment import Views


class Progress(NamedTuple):
    """How far a run is, for schedules: the passes over the data that are done, with fractions, and that will be.

    A run that is extended (--extend) is less far from then on: neither at its end nor at its begin.
    """

    epoch: float = 0.0
    epochs: float = 1.0

    @property
    def part(self) -> float:
        """0 at the first step, 1 after the last."""
        return min(1.0, self.epoch / self.epochs)


class Sample(NamedTuple):
    """What a method sees of a micro-batch.

    views: a tensor (V, B, 3, S, S) for each size, as the method's recipe has them; `views[0][v]` and
    `views[0].flatten(0, 1)` are channels-last without a copy. label_B: int64, beside the views,
    only where `needs_labels`. index_B: int64, place in the data set, on the CPU. progress: before this step.
    """

    views: Views
    label_B: Tensor | None
    index_B: Tensor
    progress: Progress = Progress()


class Output(NamedTuple):
    """What a method makes of a micro-batch.

    loss: scalar, fp32. terms: detached scalars by name, a curve each. carry: what `update` needs, such as new keys:
    tensors of rows, those of a step's micro-batches put together along dimension 0. features_NF: what the encoder that
    is evaluated makes of view 0, detached, of this rank's images, for the online probe; None: the method has none.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    carry: tuple[Tensor, ...] = ()
    features_NF: Tensor | None = None


class Method(nn.Module):
    """Networks and a loss. `encoder` and `projector` are what is trained."""

    encoder: nn.Module
    projector: nn.Module
    steady: ClassVar[tuple[str, ...]] = ()
    """Names of networks whose learning rate stays at its peak."""
    encoders: ClassVar[tuple[str, ...]] = ("encoder",)
    """Names of the encoders that take gradient."""

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the projector that are evaluated and exported: what is trained, or an average of it."""
        return self.encoder, self.projector

    def forward(self, sample: Sample) -> Output:
        """Loss and terms of one micro-batch. "Batch" in a loss is the global batch, whatever the number of ranks."""
        raise NotImplementedError

    def after_backward(self, progress: Progress) -> None:
        """Before the optimizer, once gradients are complete: what changes them, such as frozen prototypes."""

    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """After the optimizer, once a step: momentum encoder, queue, centres.

        good: 0-dim bool on the device; where it is false nothing may change, and the host must not look. progress:
        before this step. carry: see Output.
        """
