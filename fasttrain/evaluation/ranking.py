"""From scores to the likeliest classes, and how the ranks share rows and what they find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from fasttrain.evaluation.accuracy import RANKED
from fasttrain.system.collectives import sum_over_ranks

CHOSEN_ON = "a held-out tenth of train"  # never on val
NEVER = -float("inf")  # the score of a class that can't be the answer

Value = TypeVar("Value")


class Ranked(NamedTuple):
    """What a protocol has made of val, and the labels of the same images; see Evaluation of run/evaluations.py.

    draws: how often each image is among them.
    """

    protocol: str
    variant: str
    settings: dict[str, Any]
    ranked_Nr: Tensor
    label_N: Tensor
    draws: int = 1


class Sharing(Protocol):
    """Those who share the work: engine.ranks.Ranks, all of which call a protocol, or ALONE."""

    rank: int
    world_size: int

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order."""


class _Alone:
    rank, world_size = 0, 1

    def gather(self, value: Value) -> list[Value]:
        return [value]


ALONE = _Alone()  # this process does everything, whoever else there is: what the first does while the others wait


def best_classes(score_NC: Tensor) -> Tensor:
    """The likeliest classes of each row, best first: (N, r) int64 on the CPU, see evaluation/accuracy.py.

    Of equal scores the lower class comes first. Where a score is NEVER stands −1, which is no image's class: what was
    not predicted can't be right by luck.
    """
    sorted_NC, class_NC = score_NC.sort(dim=1, descending=True, stable=True)
    most = min(RANKED, score_NC.shape[1])
    return class_NC.masked_fill(sorted_NC == NEVER, -1)[:, :most].cpu()


def share_of_rows(total: int, ranks: Sharing, block: int = 1) -> slice:
    """This rank's part of so many rows, in whole blocks of `block`: a block is computed alike on however many ranks."""
    blocks = -(-total // block)
    first, end = (blocks * place // ranks.world_size * block for place in (ranks.rank, ranks.rank + 1))
    return slice(first, min(end, total))


def held_out_tenth(total: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train: those to fit to, and a tenth (one at least) to choose on. Always the same; of one row, it
    is both."""
    order = np.random.default_rng(0).permutation(total)
    count = max(1, total // 10)
    return order[count if total > 1 else 0 :], np.sort(order[:count])


def summed(ranks: Sharing) -> Callable[[Tensor], Tensor]:
    """What sums tensors over all who share."""
    return sum_over_ranks if ranks.world_size > 1 else lambda part: part
