"""Similarity losses between queries, keys and a queue of negatives.

Each function takes `impl`: "reference" (plain torch, kernels/similarity/reference.py) or "auto" (the fastest one for
the tensors given). All return a scalar in the dtype of `q_ND` with autograd for it; keys and queue take no gradient.
Shapes: q_ND, k_ND (N, D); k_MD (M, D); queue_KD (K, D); rows L2-normalised; temperatures > 0.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kernels.similarity import reference

IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference}


def _select(impl: str) -> ModuleType:
    if impl == "auto":
        return reference
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose from: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl]


def info_nce(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """InfoNCE of MoCo (arXiv 1911.05722, eq. 1): row i of k_ND is the positive of row i of q_ND."""
    return _select(impl).info_nce(q_ND, k_ND, queue_KD, temperature)


def batch_consistency(q_ND: Tensor, k_ND: Tensor, impl: str = "auto") -> Tensor:
    """Cross-similarity consistency over the pairs of a batch, Σ_{i≠j} (q_i·k_j − q_j·k_i)² / (N(N−1)); N ≥ 2."""
    return _select(impl).batch_consistency(q_ND, k_ND)


def queue_consistency(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Cross-similarity consistency over the queue: mean KL between the key's and the query's softmax over it."""
    return _select(impl).queue_consistency(q_ND, k_ND, queue_KD, temperature)


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float, impl: str = "auto") -> Tensor:
    """Uniformity of a query's similarities to the other images' keys (M ≥ 2); its own key is row first + i of k_MD."""
    return _select(impl).batch_uniformity(q_ND, k_MD, first, temperature)


def queue_uniformity(q_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Uniformity of a query's similarities to the queue; ≥ 0, and 0 only where all are equal."""
    return _select(impl).queue_uniformity(q_ND, queue_KD, temperature)
