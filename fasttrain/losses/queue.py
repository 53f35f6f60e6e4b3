"""Terms over queries, keys and a queue of negatives, without a matrix of all similarities.

A term states which readouts of the queue it needs (kernels/similarity/readout.py); all terms of a step share one pass
over the queue. What is left to do for each is O(N·D), and its gradient follows from (lse, O): see docs/objective.md.

Shapes: q_ND, k_ND (N, D): row i of k_ND is the positive of row i of q_ND; queue_KD (K, D); rows L2-normalised;
temperatures > 0. Keys and queue take no gradient. The queue may be of a narrower dtype than the queries, which are then
rounded to it for the products with it, and for nothing else. Values are scalars, fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import readout_with_maximum
from fasttrain.losses import reference
from fasttrain.system.collectives import sum_over_ranks, world_size


class Side(NamedTuple):
    """Rows that are read out at a temperature: of the queries "q", which take a gradient, or of the keys "k".

    through: the queries' softmax average takes a gradient, too, which is a second pass over the queue.
    """

    rows: Literal["q", "k"]
    temperature: float
    through: bool = False


class Read(NamedTuple):
    """A side's readout: log-sum-exp over the queue (N,), the softmax average of it (N, D), and the largest s (N,).

    The average is without gradient, unless the side is `through`; the largest always is.
    """

    lse_N: Tensor
    out_ND: Tensor
    maximum_N: Tensor


class QueueRead:
    """What one pass over the queue told of each side, and the queue itself."""

    def __init__(self, queue_KD: Tensor, sides: Mapping[Side, Read]) -> None:
        self.queue_KD, self._sides = queue_KD, sides
        self._mean_D: Tensor | None = None  # no cached_property: torch.compile can't enter its lock (Python 3.11)

    def __getitem__(self, side: Side) -> Read:
        return self._sides[side]

    @property
    def mean_D(self) -> Tensor:
        """Of the queue's rows, in fp32 at least: a read of the queue, once, for whatever needs it."""
        if self._mean_D is None:
            self._mean_D = self.queue_KD.mean(0, dtype=torch.promote_types(self.queue_KD.dtype, torch.float32))
        return self._mean_D


@dataclass(frozen=True)
class QueueTerm(ABC):
    """A scalar over (q, k, queue) at a temperature."""

    temperature: float

    @property
    def sides(self) -> tuple[Side, ...]:
        """The readouts that `value` needs."""
        return (Side("q", self.temperature),)

    @abstractmethod
    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        """The term, from the readouts of its sides."""

    @abstractmethod
    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        """The term as its formula reads."""


def queue_terms(
    terms: Sequence[QueueTerm], q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, impl: str = "auto"
) -> list[Tensor]:
    """The value of every term, by one pass over the queue: equal sides are shared, the others stacked.

    Sides whose average takes a gradient are read by a call of their own: its backward passes over the queue once more
    for all the rows of the call.

    impl: "reference" is plain torch as the formulas read, in the dtype of q_ND; others are versions of `readout`.
    """
    if impl == "reference":
        return [term.reference(q_ND, k_ND, queue_KD) for term in terms]
    read = read_queue(terms, q_ND, k_ND, queue_KD, impl)
    return [term.value(q_ND, k_ND, read) for term in terms]


def read_queue(
    terms: Sequence[QueueTerm], q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, impl: str = "auto"
) -> QueueRead:
    """The readouts that the terms need, by one pass over the queue: see `queue_terms`."""
    sides = dict.fromkeys(side for term in terms for side in term.sides)
    read: dict[Side, Read] = {}
    for through in (False, True):
        if alike := [side for side in sides if side.through == through]:
            read |= _read(alike, q_ND, k_ND, queue_KD, impl)
    return QueueRead(queue_KD, read)


def _read(sides: list[Side], q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, impl: str) -> dict[Side, Read]:
    """The readout of each side, by one call."""
    rows = {"q": q_ND.to(queue_KD.dtype), "k": k_ND.detach().to(queue_KD.dtype)}
    count = len(q_ND)
    x_RD = torch.cat([rows[side.rows] for side in sides]) if len(sides) > 1 else rows[sides[0].rows]
    temperature: float | Tensor = sides[0].temperature
    if len({side.temperature for side in sides}) > 1:
        dtype = torch.promote_types(x_RD.dtype, torch.float32)
        temperature = torch.cat(
            [torch.full((count,), side.temperature, dtype=dtype, device=x_RD.device) for side in sides]
        )
    lse_R, out_RD, maximum_R = readout_with_maximum(x_RD, queue_KD, temperature, impl=impl)
    read = {}
    for place, side in enumerate(sides):
        at = slice(place * count, (place + 1) * count)
        # The keys' gradient would end at a detached tensor; cutting it here leaves their rows out of the backward.
        lse_N, out_ND = lse_R[at], out_RD[at]
        lse_N = lse_N if side.rows == "q" else lse_N.detach()
        read[side] = Read(lse_N, out_ND if side.through else out_ND.detach(), maximum_R[at])
    return read


class Decoupled(QueueTerm):
    """Decoupled contrastive loss (Yeh et al., arXiv 2110.06848): InfoNCE without the positive in its denominator."""

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        return self._rows(q_ND, k_ND, read).mean()

    def _rows(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        return read[self.sides[0]].lse_N - dot(q_ND, k_ND) / self.temperature

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.decoupled(q_ND, k_ND, queue_KD, self.temperature)


class DecoupledWeighted(Decoupled):
    """DCLW, of the same paper: decoupled, with a positive that weighs more where it is hard."""

    def _rows(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        positive_N = positive_weights(q_ND, k_ND) * dot(q_ND, k_ND) / self.temperature
        return read[self.sides[0]].lse_N - positive_N

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.decoupled_weighted(q_ND, k_ND, queue_KD, self.temperature)


class InfoNCE(Decoupled):
    """InfoNCE of MoCo (arXiv 1911.05722, eq. 1)."""

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        # log(exp s⁺ + exp lse) − s⁺, in a form that keeps its digits where the positive outweighs the queue
        return -F.logsigmoid(-self._rows(q_ND, k_ND, read)).mean()

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.info_nce(q_ND, k_ND, queue_KD, self.temperature)


@dataclass(frozen=True)
class SCE(InfoNCE):
    """Similarity contrastive estimation (Denize et al., arXiv 2111.14585): InfoNCE whose target is the positive with
    `weight` λ, and the key's softmax over the queue with 1 − λ."""

    key_temperature: float
    weight: float

    @property
    def sides(self) -> tuple[Side, ...]:
        return Side("q", self.temperature), Side("k", self.key_temperature)

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        # logaddexp(s⁺, lse) − λ s⁺ − (1 − λ) q·O_k/τ is InfoNCE and this
        moved_N = dot(q_ND, k_ND - read[self.sides[1]].out_ND) / self.temperature
        return super().value(q_ND, k_ND, read) + (1 - self.weight) * moved_N.mean()

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.sce(q_ND, k_ND, queue_KD, self.temperature, self.key_temperature, self.weight)


@dataclass(frozen=True)
class ReSSL(QueueTerm):
    """Relational self-supervised learning (Zheng et al., arXiv 2107.09282): mean cross-entropy of the query's softmax
    over the queue under the key's. There is no positive in either."""

    key_temperature: float

    @property
    def sides(self) -> tuple[Side, ...]:
        return Side("q", self.temperature), Side("k", self.key_temperature)

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        query, key = (read[side] for side in self.sides)
        return (query.lse_N - dot(q_ND, key.out_ND) / self.temperature).mean()

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.ressl(q_ND, k_ND, queue_KD, self.temperature, self.key_temperature)


@dataclass(frozen=True)
class QueueConsistency(QueueTerm):
    """Cross-similarity consistency over the queue: mean KL from the key's softmax over it, at a temperature of its own,
    to the query's."""

    key_temperature: float

    @property
    def sides(self) -> tuple[Side, ...]:
        return Side("q", self.temperature), Side("k", self.key_temperature)

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        query, key = (read[side] for side in self.sides)
        pull_N = dot(self._difference(q_ND, k_ND), key.out_ND)
        return (pull_N - key.lse_N + query.lse_N).mean()

    def _difference(self, q_ND: Tensor, k_ND: Tensor) -> Tensor:
        """k/τ_k − q/τ, in fp32 at least."""
        if self.key_temperature == self.temperature:  # exact where both rows are alike
            return (k_ND - q_ND) / self.temperature
        return k_ND / self.key_temperature - q_ND / self.temperature

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.queue_consistency(q_ND, k_ND, queue_KD, self.temperature, self.key_temperature)


@dataclass(frozen=True)
class MutualConsistency(QueueConsistency):
    """Consistency over the queue both ways, as CO2 has it (Wei et al., arXiv 2010.02217): ½ [KL(P‖R) + KL(R‖P)] of the
    key's softmax P over the queue and the query's R.

    The log-sum-exps cancel, which leaves ½ (k/τ_k − q/τ)·(O_P − O_R). The gradient passes through O_R, too: it is
    ½ [(O_R − O_P)/τ + Cov_R(Q)(q/τ − k/τ_k)/τ], whose covariance takes the second pass.
    """

    @property
    def sides(self) -> tuple[Side, ...]:
        return Side("q", self.temperature, through=True), Side("k", self.key_temperature)

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        query, key = (read[side] for side in self.sides)
        return (dot(self._difference(q_ND, k_ND), key.out_ND - query.out_ND) / 2).mean()

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.mutual_consistency(q_ND, k_ND, queue_KD, self.temperature, self.key_temperature)


class QueueUniformity(QueueTerm):
    """Uniformity of a query's similarities to the queue; ≥ 0, and 0 only where all are equal."""

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        lse_N = read[self.sides[0]].lse_N
        return uniformity(lse_N, q_ND, read.mean_D, len(read.queue_KD), self.temperature)

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.queue_uniformity(q_ND, k_ND, queue_KD, self.temperature)


def uniformity(lse_N: Tensor, q_ND: Tensor, mean: Tensor, negatives: int, temperature: float) -> Tensor:
    """mean_i [ lse_i − q_i·mean/τ − log M ], the mean of the M negatives being (D,) or (N, D)."""
    return (lse_N - (q_ND.to(mean.dtype) * mean).sum(1) / temperature - math.log(negatives)).mean()


@torch.no_grad()
def positive_weights(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """DCLW's 2 − M · softmax_i(q_i·k_i/σ) over the M pairs of all ranks: (N,), without gradient, their mean 1."""
    exp_N = (dot(q_ND, k_ND) / reference.SIGMA).exp()  # within e^±2: no maximum need be taken off
    return 2 - exp_N * world_size() / sum_over_ranks(exp_N.mean())


def dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Row by row, at least in fp32."""
    accumulate = torch.promote_types(a_ND.dtype, torch.float32)
    return (a_ND.to(accumulate) * b_ND.to(accumulate)).sum(1)
