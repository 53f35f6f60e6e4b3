"""Similarity losses between queries, keys and a queue of negatives, without a matrix of all similarities.

Every loss takes `impl`: "reference" is plain torch as the formula reads (kernels/similarity/reference.py); the other
names are versions of the `readout` that the losses are built on (kernels/similarity/readout.py), "auto" the best one
for the tensors given. All return a scalar with autograd for the queries, in fp32 (fp64 for fp64; the reference: in the
dtype of q_ND); keys and queue take no gradient.
Shapes: q_ND, k_ND (N, D); k_MD (M, D); queue_KD (K, D); rows L2-normalised; temperatures > 0. Queue and k_MD may be
of a narrower dtype than the queries, which are then rounded to it for the products with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.kernels.similarity import losses, reference
from fasttrain.kernels.similarity.losses import Gram, QueueTerms, gram, gram_consistency
from fasttrain.kernels.similarity.readout import IMPLEMENTATIONS, readout

__all__ = [
    "IMPLEMENTATIONS", "Gram", "QueueTerms", "batch_consistency", "batch_uniformity", "decoupled", "gram",
    "gram_consistency", "info_nce", "queue_consistency", "queue_terms", "queue_uniformity", "readout",
]  # fmt: skip


def queue_terms(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, *, consistency_temperature: float | None = None,
    uniformity_temperature: float | None = None, decoupled: bool = False, impl: str = "auto",
) -> QueueTerms:  # fmt: skip
    """InfoNCE (or `decoupled`) and, where a temperature is given, consistency and uniformity over the queue.

    Each equals its own function below; here the queue is read once for all, and sides of equal temperature are shared.
    """
    if impl == "reference":
        contrast = reference.decoupled if decoupled else reference.info_nce
        c, u = consistency_temperature, uniformity_temperature
        return QueueTerms(
            contrast(q_ND, k_ND, queue_KD, temperature),
            None if c is None else reference.queue_consistency(q_ND, k_ND, queue_KD, c),
            None if u is None else reference.queue_uniformity(q_ND, queue_KD, u),
        )
    return losses.queue_terms(
        q_ND, k_ND, queue_KD, temperature, consistency_temperature=consistency_temperature,
        uniformity_temperature=uniformity_temperature, decoupled=decoupled, impl=impl,
    )  # fmt: skip


def info_nce(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """InfoNCE of MoCo (arXiv 1911.05722, eq. 1): row i of k_ND is the positive of row i of q_ND."""
    return queue_terms(q_ND, k_ND, queue_KD, temperature, impl=impl).contrast


def decoupled(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Decoupled contrastive loss (Yeh et al., arXiv 2110.06848): InfoNCE without the positive in its denominator."""
    return queue_terms(q_ND, k_ND, queue_KD, temperature, decoupled=True, impl=impl).contrast


def queue_consistency(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Cross-similarity consistency over the queue: mean KL between the key's and the query's softmax over it."""
    terms = queue_terms(q_ND, k_ND, queue_KD, temperature, consistency_temperature=temperature, impl=impl)
    assert terms.consistency is not None
    return terms.consistency


def queue_uniformity(q_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Uniformity of a query's similarities to the queue; ≥ 0, and 0 only where all are equal."""
    terms = queue_terms(q_ND, q_ND, queue_KD, temperature, uniformity_temperature=temperature, impl=impl)
    assert terms.uniformity is not None
    return terms.uniformity


def batch_consistency(q_ND: Tensor, k_ND: Tensor, impl: str = "auto") -> Tensor:
    """Cross-similarity consistency over the pairs of a batch, Σ_{i≠j} (q_i·k_j − q_j·k_i)² / (N(N−1)); N ≥ 2.

    "reference" forms N×N; all others three D×D sums, in fp64 (kernels.similarity.gram), except where N×N is no larger.
    """
    if impl == "reference" or (impl == "auto" and len(q_ND) <= q_ND.shape[1]):
        return reference.batch_consistency(q_ND, k_ND)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose from: {', '.join(IMPLEMENTATIONS)}")
    accumulate = torch.promote_types(q_ND.dtype, torch.float32)
    return gram_consistency(gram(q_ND, k_ND), len(q_ND)).to(accumulate)


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float, impl: str = "auto") -> Tensor:
    """Uniformity of a query's similarities to the other images' keys (M ≥ 2); its own key is row first + i of k_MD."""
    if impl == "reference":
        return reference.batch_uniformity(q_ND, k_MD, first, temperature)
    return losses.batch_uniformity(q_ND, k_MD, first, temperature, impl)
