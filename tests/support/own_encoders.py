"""Encoders as users write them, for `--arch support.own_encoders:NAME`."""

from typing import Any

import torch
from torch import Tensor, nn


def plain() -> nn.Module:
    """(N, 3, S, S) → (N, 6)"""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # fmt: skip


class Sized(nn.Module):
    """Patches in one row, for views of one size: (N, 3, S, S) → (N, 5)."""

    def __init__(self, size: int, patch_size: int = 8, drop_path: float = 0.0) -> None:
        super().__init__()
        if size % patch_size:
            raise ValueError(f"{size} is no multiple of {patch_size}")
        self.drop_path = drop_path
        self.patches = nn.Conv2d(3, 4, patch_size, patch_size)
        self.out = nn.Linear(4 * (size // patch_size) ** 2, 5)
        self.numbers = [p.item() for p in torch.linspace(0, 1, 3)]  # as many an encoder's rates are made

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.patches(x).flatten(1))


def maps() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def of_any_size() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten())


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.mean((2, 3)), x


def nothing() -> None:
    """A function that gives no module."""


def wanting(depth: int) -> nn.Module:
    return nn.Linear(depth, depth)


class Counted(nn.BatchNorm2d):
    """A batch norm that computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def counted() -> nn.Module:
    return nn.Sequential(Counted(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


number = 3
