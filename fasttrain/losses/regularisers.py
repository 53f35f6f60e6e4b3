"""XMoCo's two regularisers (arXiv 2206.04676) and POT's (arXiv 2309.13944), for every method with queries and keys.

    L = (1 − κ) · L_contrast + κ · L_compactness + λ_x · L_cross + λ_u · L_uniform

XMoCo's are read over the batch or over the queue; the equations are in docs/objective.md. What is read over the queue
shares the contrast's pass over it. Under data parallelism "batch" is the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.batch import batch_consistency, batch_uniformity, worst_compactness
from fasttrain.losses.figures import mean_figures, queue_figures
from fasttrain.losses.options import BatchRegularisers, Regularisers
from fasttrain.losses.queue import MutualConsistency, QueueConsistency, QueueTerm, QueueUniformity, read_queue
from fasttrain.system.collectives import gather_rows
from fasttrain.system.errors import UserError

CONSISTENCIES = {"queue": QueueConsistency, "queue-both": MutualConsistency}


def regularised(
    contrast: QueueTerm | Tensor, options: BatchRegularisers, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor | None,
    queue_KD: Tensor | None, directions: int = 1, pairs: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The contrast with the regularisers that are on: the loss, and every term's detached value by name, with the
    figures of a contrast over the queue.

    contrast: a term over the queue, or the value of a loss that needs none. q_ND, k_ND (N, D): this rank's queries and
    keys; k_MD (M, D): the keys of all ranks, None to gather them only for a term that needs them; queue_KD (K, D), None
    for a method that has no queue. directions: of a symmetric loss, such as first view to second and back; q_ND, k_ND
    and k_MD are then those of one direction after the other, and every term is the mean over them. pairs: queries and
    keys (N, D) of the pairs of views among which compactness looks for an image's worst; none: those of the directions.
    Raises UserError where a queue is needed.
    """
    over_queue: dict[str, QueueTerm] = {}
    values: dict[str, Tensor] = {}
    figures: dict[str, Tensor] = {}
    if isinstance(contrast, QueueTerm):
        over_queue["contrast"] = contrast
    else:
        values["contrast"] = contrast
    if isinstance(options, Regularisers):
        if options.cross in CONSISTENCIES:
            over_queue["cross"] = CONSISTENCIES[options.cross](
                options.cross_temperature, options.cross_key_temperature or options.cross_temperature
            )
        if options.uniform == "queue":
            over_queue["uniform"] = QueueUniformity(options.uniform_temperature)
    if over_queue:
        if queue_KD is None:
            raise UserError("--cross queue and --uniform queue are for methods that have a queue; use batch")
        read = read_queue(list(over_queue.values()), q_ND, k_ND, queue_KD)
        values |= {name: term.value(q_ND, k_ND, read) for name, term in over_queue.items()}
        if isinstance(contrast, QueueTerm):
            figures = queue_figures(contrast, q_ND, k_ND, read)
    parts = list(zip(q_ND.chunk(directions), k_ND.chunk(directions), strict=True))
    if options.over_batch and not options.of_encoder:
        values["cross"] = _mean(batch_consistency(q, k, options.within) for q, k in parts)
    if options.uniform == "batch":
        if k_MD is None:
            with torch.no_grad():
                k_MD = torch.cat([gather_rows(k) for _, k in parts])
        narrow_MD = k_MD if queue_KD is None else k_MD.to(queue_KD.dtype)
        all_keys = narrow_MD.chunk(directions)
        values["uniform"] = _mean(
            batch_uniformity(q, keys, options.uniform_temperature) for (q, _), keys in zip(parts, all_keys, strict=True)
        )

    loss = values["contrast"]
    if options.compactness:
        values["compactness"] = worst_compactness(pairs or parts)
        loss = (1 - options.compactness) * loss + options.compactness * values["compactness"]
    for name, weight in (("cross", options.cross_weight), ("uniform", options.uniform_weight)):
        if name in values:
            loss = loss + weight * values[name]
    return loss, {name: value.detach() for name, value in values.items()} | figures


def with_features(
    made: tuple[Tensor, dict[str, Tensor]], options: BatchRegularisers, queries: Sequence[Tensor],
    keys: Sequence[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """A loss and its terms; with --cross-features encoder, with the consistency of what the encoder gave.

    queries, keys: outputs (N, F) of the encoder for each direction's two views of this rank's images. Keys take no
    gradient.
    """
    if not options.of_encoder:
        return made
    loss, terms = made
    rows = ([F.normalize(feature_NF.float(), dim=1) for feature_NF in features] for features in (queries, keys))
    cross = _mean(batch_consistency(q, k, options.within) for q, k in zip(*rows, strict=True))
    return loss + options.cross_weight * cross, terms | {"cross": cross.detach()}


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def averaged(directions: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the terms of a method that has queries in both views: means over its directions."""
    losses, terms = zip(*directions, strict=True)
    return _mean(losses), mean_figures(terms)
