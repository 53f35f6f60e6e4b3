"""An encoder that stays as it is, for a method that compares its own with it (DBL, arXiv 2404.18114)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Anchor(nn.Module):
    """A copy of an encoder (N, 3, S, S) → (N, F), frozen and in evaluation mode whatever the mode of what holds it.

    Its weights are another run's, which training gives to it before the first step, see MethodOptions.anchored_to.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Anchor:
        """Evaluation mode for any mode: running statistics are part of what it was trained to be."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)
