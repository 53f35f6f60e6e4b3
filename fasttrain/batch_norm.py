"""Batch norm that does not tell a query which key is its own.

With ordinary batch norm the network can recognise its positive by the statistics both share (MoCo, arXiv 1911.05722,
section 3.3, "shuffling BN"). Here statistics are taken over groups of a few dozen images and the key batch is permuted
inside the rank (fasttrain/methods/moco.py), so the two views of an image are normalised with different groups. Nothing
is communicated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Context = Any  # autograd's, which takes any attribute

GROUP_SIZE = 32  # images that share statistics; MoCo's 256 images on 8 GPUs


class _SplitBatchNorm(nn.Module):
    """Normalises each group of about GROUP_SIZE rows by its own statistics in training, by running ones otherwise."""

    def __init__(self, plain: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        """Takes over the parameters and buffers of `plain`, under the same names."""
        super().__init__()
        if plain.momentum is None or not plain.track_running_stats:
            raise ValueError("split batch norm needs running statistics with a fixed momentum")
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", plain.running_mean)
        self.register_buffer("running_var", plain.running_var)
        self.register_buffer("num_batches_tracked", plain.num_batches_tracked)
        self.eps, self.momentum = plain.eps, plain.momentum

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        groups = max(1, round(x.shape[0] / GROUP_SIZE))
        momentum = self.momentum / groups  # so that all groups together move the running statistics once
        running = self.running_mean, self.running_var
        if groups == 1 or torch.compiler.is_compiling():  # a compiler makes its own of the plain form
            arguments = *running, self.weight, self.bias, True, momentum, self.eps
            out = [F.batch_norm(group, *arguments) for group in x.tensor_split(groups)]
            return out[0] if groups == 1 else torch.cat(out)
        return _NormaliseGroups.apply(x, self.weight, self.bias, *running, groups, momentum, self.eps)


class _NormaliseGroups(torch.autograd.Function):
    """torch's batch norm of each group, written into its place of the whole.

    Autograd of the groups one by one would concatenate what comes out, and in backward pad every group's gradient with
    zeros and add them up: a quarter of a small encoder's step on a CPU.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, groups: int,
        momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(x)
        ctx.groups, ctx.eps = groups, eps
        saved = mean.new_empty((2, groups, mean.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
        for group, place, *statistics in zip(*_split(groups, x, out), *saved, strict=True):
            torch.ops.aten.native_batch_norm.out(
                group, weight, bias, mean, variance, True, momentum, eps,
                out=place, save_mean=statistics[0], save_invstd=statistics[1],
            )  # fmt: skip
        ctx.save_for_backward(x, weight, saved)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, saved = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), []
        parts = zip(*_split(ctx.groups, grad, x, grad_x), *saved, strict=True)
        for grad_group, group, place, mean, inverse_std in parts:
            part, *both = torch.ops.aten.native_batch_norm_backward(
                grad_group, group, weight, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
            )
            place.copy_(part)
            sums.append(torch.stack(both))
        grad_weight, grad_bias = torch.stack(sums).sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _split(groups: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.tensor_split(groups) for tensor in tensors]


def convert_batch_norm(module: nn.Module, kind: str) -> nn.Module:
    """Replace every batch norm in `module`: kind "plain" leaves them, "split" see above, "sync" takes statistics over
    all processes (torch's SyncBatchNorm; one process keeps the plain kind)."""
    if kind == "sync" and torch.distributed.is_initialized() and torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if kind == "split":
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, _SplitBatchNorm(child))
            else:
                convert_batch_norm(child, kind)
    return module


class RunningStatistics:
    """The running statistics of every batch norm in a module, so that a step that is skipped can take its own back."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            buffer
            for child in module.modules()
            for buffer in (child._buffers.get("running_mean"), child._buffers.get("running_var"))
            if buffer is not None
        ]
        self._saved = self._flat()

    def save(self) -> None:
        """Remember them as they are now."""
        self._saved = self._flat()

    @torch.no_grad()
    def keep_if(self, good: Tensor) -> None:
        """Put back what was saved unless `good` (0-dim bool on the device)."""
        if self._buffers:
            chosen = torch.where(good, self._flat(), self._saved).split([b.numel() for b in self._buffers])
            torch._foreach_copy_(self._buffers, list(chosen))

    def _flat(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers] or [torch.empty(0)])
