"""The contract between a method and everything else."""

from __future__ import annotations

from torch import Tensor, nn

from fasttrain.config import TrainConfig
from fasttrain.kernels.augment import Views


class Method(nn.Module):
    """Two views in, a loss out. A subclass sets `encoder` and `projector`, the networks that are evaluated and kept."""

    encoder: nn.Module
    projector: nn.Module

    def __init__(self, config: TrainConfig, feature_width: int) -> None:
        """feature_width: width F of the encoder's output (N, F)."""
        super().__init__()
        self.config = config
        self.feature_width = feature_width

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """views (V, B, 3, S, S) of each size, channels-last → scalar loss in fp32 and its detached scalar terms."""
        raise NotImplementedError

    def after_step(self, good: Tensor | None = None) -> None:
        """What follows the optimizer's step, once for all micro-batches that forward has seen: momentum encoder, queue.

        good: 0-dim bool on the device, false where the step was skipped because its gradients were not finite: then
        nothing may change, and the host must not look. None: true.
        """
        raise NotImplementedError
