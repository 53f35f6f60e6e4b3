"""NNCLR's contrast: each view's nearest neighbour in a support set against the other view's predictions.

Shapes: neighbour_ND, p_ND (N, D): this rank's rows, row i of neighbour_ND the positive of row i of p_ND; rows
L2-normalised.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import log_sum_exp
from fasttrain.losses import reference
from fasttrain.losses.queue import positive_weights
from fasttrain.system.collectives import first_row, gather_rows


def neighbour_contrast(
    neighbour_ND: Tensor, p_ND: Tensor, temperature: float, decoupled: bool = False, weighted: bool = False,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """mean_i −log softmax_j(n_i·p_j/τ) at j = i, over the p of all ranks (NNCLR, arXiv 2104.14548).

    The gradient goes to p alone, to that of all ranks. decoupled: its own p is left out of a row's denominator
    (arXiv 2110.06848); weighted: of these, DCLW, where pairs that are far apart weigh more. impl: "reference" is plain
    torch, of one rank; others are versions of `log_sum_exp`. Scalar, fp32 (fp64 for fp64). Raises ValueError where the
    p of all ranks are fewer than two.
    """
    neighbour_ND = neighbour_ND.detach()
    if impl == "reference":
        return reference.neighbour_contrast(neighbour_ND, p_ND, temperature, decoupled, weighted)
    lse_N = log_sum_exp(neighbour_ND, gather_rows(p_ND), temperature, own=first_row(len(p_ND)), impl=impl)
    positive_N = (neighbour_ND * p_ND).sum(1) / temperature
    if weighted:
        return (lse_N - positive_weights(neighbour_ND, p_ND) * positive_N).mean()
    rows_N = lse_N - positive_N
    return (rows_N if decoupled else -F.logsigmoid(-rows_N)).mean()
