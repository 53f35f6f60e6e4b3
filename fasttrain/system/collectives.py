"""What a loss needs of the other ranks' rows. On one process each is the identity and costs nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# its name until torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(x_ND: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (W·N, D), without gradient. Every rank must hold the same N."""
    if world_size() == 1:
        return x_ND.detach()
    out_MD = x_ND.new_empty(world_size() * x_ND.shape[0], x_ND.shape[1])
    _all_gather(out_MD, x_ND.detach().contiguous())
    return out_MD


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Every rank computes the same loss of the same sum, so this is that loss's whole gradient for its own part;
        # times W because DDP then divides the sum over ranks by W.
        return grad * world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' x, differentiable, for a loss that every rank computes alike over the global batch."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)
