"""The look-up of each row's nearest row of a queue, without a matrix of all similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.kernels.similarity import reference
from fasttrain.kernels.similarity.versions import check, implementation, version


def nearest(x_RD: Tensor, queue_KD: Tensor, *, impl: str = "auto") -> Tensor:
    """argmax_j x_i·Q_j: for each row the queue row of the largest product, of equals the first.

    x_RD: (R, D), queue_KD: (K, D), K ≥ 1, of one dtype: fp32, bf16, fp16 or fp64; products are summed and compared in
    fp32 (fp64 for fp64). impl: as of `readout`. A product that is not a number counts as the largest, as it does for
    torch.argmax, so that a bad row of the queue shows instead of being passed over.

    Returns (R,) int64, without gradient. Raises ValueError as `readout` does.
    """
    chosen = implementation(impl, x_RD)
    check(x_RD, queue_KD)
    if chosen == "reference":
        accumulate = torch.promote_types(x_RD.dtype, torch.float32)
        return reference.nearest(x_RD.detach().to(accumulate), queue_KD.detach().to(accumulate))
    return _nearest(x_RD.detach(), queue_KD.detach(), chosen)


@torch.library.custom_op("fasttrain::nearest", mutates_args=())
def _nearest(x_RD: Tensor, queue_KD: Tensor, impl: str) -> Tensor:
    return version(impl).nearest(x_RD.contiguous(), queue_KD.contiguous())


@_nearest.register_fake
def _(x_RD: Tensor, queue_KD: Tensor, impl: str) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], dtype=torch.int64)
