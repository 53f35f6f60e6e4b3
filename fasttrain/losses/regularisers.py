"""XMoCo's two regularisers (arXiv 2206.04676), for every method with queries and keys.

    L = L_contrast + λ_x · L_cross + λ_u · L_uniform

Each is read over the batch or over the queue; the equations are in docs/objective.md. What is read over the queue
shares the contrast's pass over it. Under data parallelism "batch" is the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fasttrain.losses.batch import batch_consistency, batch_uniformity
from fasttrain.losses.queue import QueueConsistency, QueueTerm, QueueUniformity, queue_terms
from fasttrain.system.collectives import gather_rows
from fasttrain.system.errors import UserError
from fasttrain.system.options import NotNegative, Options, Positive


@dataclass(frozen=True)
class Regularisers(Options):
    """XMoCo's regularisers, on top of the method's own loss."""

    cross: Literal["batch", "queue", "none"] = "none"
    """Cross-similarity consistency: keep similarities between views over the batch's pairs, or each image's
    similarities to the queue."""
    cross_weight: NotNegative[float] = 1.0
    """Weight of that consistency."""
    cross_temperature: Positive[float] = 0.2
    """Temperature of the distributions compared by --cross queue."""
    uniform: Literal["batch", "queue", "none"] = "none"
    """Uniform similarity: which negatives' similarities should be uniform."""
    uniform_weight: NotNegative[float] = 0.1
    """Weight of that uniformity."""
    uniform_temperature: Positive[float] = 0.2
    """Temperature of the distribution that should be uniform."""

    def check_without_queue(self) -> None:
        """Raises UserError where a term is to be read over the queue, of which the method has none."""
        for name, value in (("cross", self.cross), ("uniform", self.uniform)):
            if value == "queue":
                raise UserError(f"--{name} queue is for methods that have a queue, as this one has not; use batch")


def regularised(
    contrast: QueueTerm | Tensor, options: Regularisers, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor | None,
    queue_KD: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The contrast with the regularisers that are on: the loss, and every term's detached value by name.

    contrast: a term over the queue, or the value of a loss that needs none. q_ND, k_ND (N, D): this rank's queries and
    keys; k_MD (M, D): the keys of all ranks, None to gather them only for a term that needs them; queue_KD (K, D), None
    for a method that has no queue. Raises UserError where one is needed.
    """
    over_queue: dict[str, QueueTerm] = {}
    values: dict[str, Tensor] = {}
    if isinstance(contrast, QueueTerm):
        over_queue["contrast"] = contrast
    else:
        values["contrast"] = contrast
    if options.cross == "queue":
        over_queue["cross"] = QueueConsistency(options.cross_temperature)
    if options.uniform == "queue":
        over_queue["uniform"] = QueueUniformity(options.uniform_temperature)
    if over_queue:
        if queue_KD is None:
            raise UserError("--cross queue and --uniform queue are for methods that have a queue; use batch")
        values |= zip(over_queue, queue_terms(list(over_queue.values()), q_ND, k_ND, queue_KD), strict=True)
    if options.cross == "batch":
        values["cross"] = batch_consistency(q_ND, k_ND)
    if options.uniform == "batch":
        with torch.no_grad():
            k_MD = gather_rows(k_ND) if k_MD is None else k_MD
        narrow_MD = k_MD if queue_KD is None else k_MD.to(queue_KD.dtype)
        values["uniform"] = batch_uniformity(q_ND, narrow_MD, options.uniform_temperature)

    loss = values["contrast"]
    for name, weight in (("cross", options.cross_weight), ("uniform", options.uniform_weight)):
        if name in values:
            loss = loss + weight * values[name]
    return loss, {name: value.detach() for name, value in values.items()}


def averaged(directions: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the terms of a method that has queries in both views: means over its directions."""
    losses, terms = zip(*directions, strict=True)
    means = {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}
    return torch.stack(losses).mean(), means
