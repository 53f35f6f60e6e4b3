"""How well classes were predicted. A share of right answers says little alone: what guessing gives stands beside it.

A protocol ranks classes: ranked_Nr (N, r) int64 on the CPU holds each image's likeliest ones, best first, r the smaller
of RANKED and the number of classes; -1 where it names no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RANKED = 5  # classes of each image
_Z = 1.959964  # of a normal distribution, 95 % lie within as many deviations


class Accuracy(NamedTuple):
    """In percent.

    top1, top5: of all images; top5 None where there are no more classes than that. balanced: the mean of each class's
    own top1, over the classes that occur. majority: what top1 would be if the most frequent class were always the
    answer. low, high: the 95 % interval of top1 that follows from the number of images (Wilson 1927).
    """

    top1: float
    top5: float | None
    balanced: float
    majority: float
    low: float
    high: float


def accuracy(ranked_Nr: Tensor, label_N: Tensor, num_classes: int, draws: int = 1) -> Accuracy:
    """Compare ranked classes with labels, (N,) whole numbers from 0 on, N ≥ 1, both on the CPU.

    draws: how often every image is among them, ranked by another classifier each time; the interval is the images'.
    """
    share_C, count_C = _right(ranked_Nr, label_N)
    top1 = float((ranked_Nr[:, 0] == label_N).double().mean())
    top5 = float((ranked_Nr == label_N[:, None]).any(1).double().mean()) if num_classes > RANKED else None
    balanced, majority = float(share_C[count_C > 0].mean()), float(count_C.max() / len(label_N))
    parts = (top1, top5, balanced, majority, *wilson(top1, len(label_N) // draws))
    return Accuracy(*(None if part is None else round(100 * part, 2) for part in parts))  # type: ignore[arg-type]


def per_class(ranked_Nr: Tensor, label_N: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracy in percent of each class that occurs among the labels, by its name."""
    share_C, count_C = _right(ranked_Nr, label_N)
    return {
        classes[place]: round(100 * float(share), 2)
        for place, (share, count) in enumerate(zip(share_C, count_C, strict=True))
        if count
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of `count` independent ones (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    middle, spread = share + _Z**2 / (2 * count), _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return tuple(min(1.0, max(0.0, (middle + side) / (1 + _Z**2 / count))) for side in (-spread, spread))  # type: ignore[return-value]


def _right(ranked_Nr: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each class's share of right answers, fp64, 0 for one without images; and its images."""
    count_C = torch.bincount(label_N)
    right_C = torch.bincount(label_N[ranked_Nr[:, 0] == label_N], minlength=len(count_C))
    return right_C / count_C.clamp_min(1).double(), count_C
