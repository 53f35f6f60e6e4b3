"""How well classes were predicted. A share of right answers says little alone: what guessing gives stands beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """In percent.

    top1: of all images. balanced: the mean of each class's own, over the classes that occur. majority: what top1 would
    be if the most frequent class were always the answer.
    """

    top1: float
    balanced: float
    majority: float


def accuracy(predicted_N: Tensor, label_N: Tensor) -> Accuracy:
    """Compare predictions with labels, (N,) whole numbers from 0 on, N ≥ 1, both on the CPU."""
    count_C = torch.bincount(label_N)
    right_C = torch.bincount(label_N[predicted_N == label_N], minlength=len(count_C))
    occurs_C = count_C > 0
    balanced = (right_C[occurs_C] / count_C[occurs_C].double()).mean()
    total = len(label_N)
    return Accuracy(*(round(100 * float(part), 2) for part in (right_C.sum() / total, balanced, count_C.max() / total)))
