"""Batch norm over the rows of several ranks (Ioffe & Szegedy, arXiv 1502.03167, section 3), each of as many rows.

torch's own SyncBatchNorm, which takes any number of rows, has the host wait for the device in every layer.

Shapes: x (N, C, …) of this rank; weight, bias, running statistics (C,). Statistics are fp32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.autograd import Context
from fasttrain.system.collectives import ALL, Peers, gather_rows, world_size


def normalise_together(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float,
    eps: float, peers: Peers,
) -> Tensor:  # fmt: skip
    """x by its channels' statistics over all peers, by which the running ones move, in place.

    A compiler fuses the plain form; on a GPU without one it would take several passes, which torch's kernels do not.
    """
    native = x.is_cuda and not torch.compiler.is_compiling()
    normalise = NormaliseNatively if native else NormaliseTogether
    return normalise.apply(x, weight, bias, running_mean, running_var, momentum, eps, peers)


class NormaliseTogether(torch.autograd.Function):
    """In plain torch."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        momentum: float, eps: float, peers: Peers = ALL,
    ) -> Tensor:  # fmt: skip
        ctx.peers = peers
        dims = [0, *range(2, x.dim())]
        var_WC, mean_WC = _of_all(*torch.var_mean(_wide(x), dims, correction=0), peers)
        mean_C = mean_WC.mean(0)
        var_C = (var_WC + (mean_WC - mean_C).square()).mean(0)
        rows = x.numel() // x.shape[1] * len(var_WC)
        running_mean.lerp_(mean_C, momentum)
        running_var.lerp_(var_C * (rows / max(1, rows - 1)), momentum)
        ctx.save_for_backward(x, weight, mean_C, (var_C + eps).rsqrt())
        ctx.rows = rows
        return F.batch_norm(x, mean_C, var_C, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean_C, inverse_std_C = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [0, *range(2, x.dim())]
        grad_32, normed = _wide(grad), (_wide(x) - mean_C.view(shape)) * inverse_std_C.view(shape)
        own_2C = torch.stack([grad_32.sum(dims), (grad_32 * normed).sum(dims)])
        first, second = (_summed(own_2C, ctx.peers) / ctx.rows).view(2, *shape).unbind(0)
        scale_C = inverse_std_C if weight is None else weight * inverse_std_C
        grad_x = scale_C.view(shape) * (grad_32 - first - normed * second)
        own = (None, None) if weight is None else own_2C.flip(0).to(weight.dtype).unbind()
        return grad_x.to(x.dtype), *own, None, None, None, None, None


class NormaliseNatively(torch.autograd.Function):
    """By torch's kernels for a GPU, those of its SyncBatchNorm."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        momentum: float, eps: float, peers: Peers = ALL,
    ) -> Tensor:  # fmt: skip
        ctx.peers = peers
        x = _dense(x)
        mean_WC, inverse_std_WC = _of_all(*torch.batch_norm_stats(x, eps), peers)
        rows_W = mean_WC.new_full((len(mean_WC),), x.numel() // x.shape[1])
        mean_C, inverse_std_C = torch.batch_norm_gather_stats_with_counts(
            x, mean_WC, inverse_std_WC, running_mean, running_var, momentum, eps, rows_W
        )
        ctx.save_for_backward(x, weight, mean_C, inverse_std_C, rows_W.int())
        return torch.batch_norm_elemt(x, weight, bias, mean_C, inverse_std_C, eps)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean_C, inverse_std_C, rows_W = ctx.saved_tensors
        grad, affine = _dense(grad), weight is not None
        *own, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean_C, inverse_std_C, weight, True, affine, affine
        )
        total_C, along_C = _summed(torch.stack(own), ctx.peers).unbind()
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean_C, inverse_std_C, weight, total_C, along_C, rows_W)
        return grad_x, *((grad_weight, grad_bias) if affine else (None, None)), None, None, None, None, None


def _of_all(first_C: Tensor, second_C: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
    """Both of all peers, (W, C) each, by one collective."""
    own_2C = torch.stack([first_C, second_C])
    first_WC, second_WC = gather_rows(own_2C.flatten()[None], peers).unflatten(1, own_2C.shape).unbind(1)
    return first_WC, second_WC


def _summed(own_2C: Tensor, peers: Peers) -> Tensor:
    """Over the peers. The statistics are those of all, so each loss has a part in every row's gradient; DDP takes the
    mean of the parameters' own gradients."""
    all_2C = own_2C.clone()
    if world_size() > 1:
        torch.distributed.all_reduce(all_2C, group=peers.group)
    return all_2C


def _dense(x: Tensor) -> Tensor:
    """In one of the two layouts that the kernels know."""
    return x if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
