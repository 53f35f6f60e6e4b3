"""Projection heads: what stands between an encoder's features and the vectors that a loss compares."""

from __future__ import annotations

from torch import nn


def linear_head(width: int, dim: int) -> nn.Module:
    """(N, width) → (N, dim), linear (MoCo v1)."""
    return nn.Linear(width, dim)


def mlp_head(width: int, dim: int) -> nn.Module:
    """(N, width) → (N, dim), one hidden layer as wide as the features (MoCo v2, after SimCLR, arXiv 2002.05709)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
