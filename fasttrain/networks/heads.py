"""Projection heads: what stands between an encoder's features and the vectors that a loss compares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn


def linear_head(width: int, dim: int) -> nn.Module:
    """(N, width) → (N, dim), linear (MoCo v1)."""
    return nn.Linear(width, dim)


def mlp_head(width: int, dim: int, hidden: int | None = None) -> nn.Module:
    """(N, width) → (N, dim), one hidden layer, as wide as the features where nothing else is said (MoCo v2, after
    SimCLR, arXiv 2002.05709)."""
    hidden = hidden or width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def bottleneck(dim: int) -> nn.Sequential:
    """(N, dim) → (N, dim) through a half and a quarter of the width, GELU between (MCLRec, arXiv 2304.07763)."""
    widths = dim, max(1, dim // 2), max(1, dim // 4), dim
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def gelu_mlp(width: int, hidden: Sequence[int], dim: int, norm: bool = False) -> nn.Sequential:
    """(N, width) → (N, dim): linear layers with biases, GELU between them, and batch norm before that if wanted.

    Weights from a normal distribution of deviation 0.02 without its tails, biases 0 (DINO, arXiv 2104.14294, and its
    code).
    """
    layers: list[nn.Module] = []
    for before, after in pairwise((width, *hidden, dim)):
        linear = nn.Linear(before, after)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(after)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers[: -1 - norm])


def batch_norm_mlp(
    width: int, hidden: Sequence[int], dim: int, end: Literal["linear", "bias", "norm", "affine"] = "linear"
) -> nn.Sequential:
    """(N, width) → (N, dim): linear layers, each hidden one followed by batch norm and ReLU.

    end: the output layer is linear alone, with a bias, or followed by a batch norm: without a scale and a shift, or
    with them. A layer that a batch norm follows has no bias, as it would be taken off again.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise((width, *hidden)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers.append(nn.Linear((width, *hidden)[-1], dim, bias=end == "bias"))
    if end in ("norm", "affine"):
        layers.append(nn.BatchNorm1d(dim, affine=end == "affine"))
    return nn.Sequential(*layers)
