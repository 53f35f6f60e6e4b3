"""Batch norm that does not tell a query which key is its own.

With ordinary batch norm the network can recognise its positive by the statistics both share (MoCo, arXiv 1911.05722,
section 3.3, "shuffling BN"). Here statistics are taken over groups of a few dozen images, and the images of keys are
shuffled over all ranks (shuffle.py), so the two views of an image are normalised with different groups (how different:
groups.py). Batch norm itself communicates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.kernels.autograd import Context
from fasttrain.networks.groups import GROUPS, groups_of_rank
from fasttrain.networks.synchronised import normalise_together
from fasttrain.system.collectives import ALL, Peers, of_machine, world_size
from fasttrain.system.errors import UserError

TIMM_S = "BatchNormAct2d"  # batch norm, then what it holds as modules


class _BatchNorm(nn.Module):
    """Normalises by running statistics in evaluation; what it does in training is up to `_normalised`."""

    def __init__(self, plain: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        """Takes over the parameters, buffers and modules of `plain`, under the same names. Raises UserError for one
        that computes something else than torch's or timm's."""
        super().__init__()
        known = type(plain).forward is nn.BatchNorm2d.forward or type(plain).__name__ == TIMM_S
        if not known or plain.momentum is None or not plain.track_running_stats:
            raise UserError(
                f"--batch-norm plain is all that this encoder can have: its {type(plain).__name__} is of another kind "
                "than torch's, or has no running statistics with a fixed momentum"
            )
        self.weight: Tensor | None = plain.weight  # None, as is the bias, without affine parameters
        self.bias: Tensor | None = plain.bias
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", plain.running_mean)
        self.register_buffer("running_var", plain.running_var)
        self.register_buffer("num_batches_tracked", plain.num_batches_tracked)
        self.eps, self.momentum = plain.eps, plain.momentum
        for name, child in plain.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self._normalised(x)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        for child in self.children():  # timm's: drop and act
            x = child(x)
        return x

    def _normalised(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _SplitBatchNorm(_BatchNorm):
    """In training, each group of rows has statistics of its own.

    Running statistics move by the mean over the groups, which is the mean of as many copies that each moved by their
    own: MoCo's SplitBatchNorm.
    """

    def __init__(self, plain: nn.BatchNorm1d | nn.BatchNorm2d, groups: int) -> None:
        """groups: over all ranks."""
        super().__init__(plain)
        self._groups, self._ranks = groups, world_size()

    def _normalised(self, x: Tensor) -> Tensor:
        groups = groups_of_rank(x.shape[0], self._groups, self._ranks)
        if groups == 1:
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        if groups == x.shape[0]:
            raise ValueError(f"{groups} images can't be cut into equal groups for batch norm (see check_groups)")
        normalise = _NormaliseFusibly if torch.compiler.is_compiling() else _NormaliseGroups
        out, mean_GC, unbiased_GC = normalise.apply(x, self.weight, self.bias, groups, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean_GC.mean(0), self.momentum)
            self.running_var.lerp_(unbiased_GC.mean(0), self.momentum)
        return out


class _SyncBatchNorm(_BatchNorm):
    """In training, several ranks share their statistics. Each of them must hold as many rows."""

    def __init__(self, plain: nn.BatchNorm1d | nn.BatchNorm2d, peers: Peers) -> None:
        super().__init__(plain)
        self._peers = peers

    def _normalised(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return normalise_together(x, self.weight, self.bias, *running, self.momentum, self.eps, self._peers)


class _NormaliseGroups(torch.autograd.Function):
    """torch's batch norm of each group, written into its place of the whole; also the groups' means and unbiased
    variances (G, C), fp32 at least.

    Autograd of the groups one by one would concatenate what comes out, and in backward pad every group's gradient with
    zeros and add them up: a quarter of a small encoder's step on a CPU.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.empty_like(x)
        ctx.groups, ctx.eps = groups, eps
        saved = _wide(x.new_empty(2, groups, x.shape[1]))
        moved = torch.zeros_like(saved)  # running statistics, which a momentum of 1 moves all the way
        for group, place, *statistics in zip(x.chunk(groups), out.chunk(groups), *saved, *moved, strict=True):
            torch.ops.aten.native_batch_norm.out(
                group, weight, bias, *statistics[2:], True, 1.0, eps,
                out=place, save_mean=statistics[0], save_invstd=statistics[1],
            )  # fmt: skip
        ctx.save_for_backward(x, weight, saved)
        mean_GC, unbiased_GC = moved.unbind()
        ctx.mark_non_differentiable(mean_GC, unbiased_GC)
        return out, mean_GC, unbiased_GC

    @staticmethod
    def backward(ctx: Context, grad: Tensor, *_of_statistics: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, saved = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), []
        wanted = [True, weight is not None, weight is not None]
        parts = zip(*(tensor.chunk(ctx.groups) for tensor in (grad, x, grad_x)), *saved, strict=True)
        for grad_group, group, place, mean, inverse_std in parts:
            part, *both = torch.ops.aten.native_batch_norm_backward(
                grad_group, group, weight, None, None, mean, inverse_std, True, ctx.eps, wanted
            )
            place.copy_(part)
            if weight is not None:
                sums.append(torch.stack(both))
        grad_weight, grad_bias = torch.stack(sums).sum(0) if sums else (None, None)
        return grad_x, grad_weight, grad_bias, None, None


class _NormaliseFusibly(torch.autograd.Function):
    """The same for a compiler: two kernels forward, two backward, as of plain batch norm.

    Backward is written out because autograd of the
    forward takes four passes over the images where two do: a fifth of what a compiled ResNet-50 reads and writes.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        var_GC, mean_GC = torch.var_mean(_grouped(x, groups), _own_dims(x), correction=0)
        inverse_std_GC = (var_GC + eps).rsqrt()
        out = (_wide(x) - _of_each(mean_GC, x)) * _of_each(_scaled(inverse_std_GC, weight), x)
        if bias is not None:
            out = out + bias.view(1, -1, *[1] * (x.dim() - 2))
        ctx.save_for_backward(x, weight, mean_GC, inverse_std_GC)
        rows = x.numel() // mean_GC.numel()
        unbiased_GC = var_GC * (rows / (rows - 1))
        ctx.mark_non_differentiable(mean_GC, unbiased_GC)
        return out.to(x.dtype), mean_GC, unbiased_GC

    @staticmethod
    def backward(ctx: Context, grad: Tensor, *_of_statistics: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean_GC, inverse_std_GC = ctx.saved_tensors
        groups = len(mean_GC)
        rows = x.numel() // mean_GC.numel()
        grad, centred = _wide(grad), _wide(x) - _of_each(mean_GC, x)
        grad_bias_GC = _grouped(grad, groups).sum(_own_dims(x))
        grad_weight_GC = _grouped(grad * centred, groups).sum(_own_dims(x)) * inverse_std_GC
        along_GC = grad_weight_GC * inverse_std_GC / rows
        grad_x = grad - _of_each(grad_bias_GC / rows, x) - centred * _of_each(along_GC, x)
        grad_x = grad_x * _of_each(_scaled(inverse_std_GC, weight), x)
        if weight is None:
            return grad_x.to(x.dtype), None, None, None, None
        return grad_x.to(x.dtype), grad_weight_GC.sum(0), grad_bias_GC.sum(0), None, None


def _scaled(inverse_std: Tensor, weight: Tensor | None) -> Tensor:
    return inverse_std if weight is None else weight * inverse_std


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, …) → (G, N/G, C, …), fp32 at least."""
    return _wide(x.unflatten(0, (groups, -1)))


def _wide(x: Tensor) -> Tensor:
    """fp32 at least, as all statistics are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _own_dims(x: Tensor) -> list[int]:
    """Of grouped x (N, C, …): all but group and channel."""
    return [1, *range(3, x.dim() + 1)]


def _of_each(value_GC: Tensor, x: Tensor) -> Tensor:
    """A group's value for each of its images: (N, C, 1, …), nothing copied once compiled."""
    groups, channels = value_GC.shape
    each = value_GC[:, None].expand(groups, x.shape[0] // groups, channels)
    return each.reshape(x.shape[0], channels, *[1] * (x.dim() - 2))


def convert_batch_norm(module: nn.Module, kind: str, groups: int = GROUPS) -> nn.Module:
    """Replace every batch norm in `module`: kind "plain" leaves them, "split" see above, "sync" takes statistics over
    all processes, "machine" over those of each machine (one process keeps the plain kind).

    groups: of "split", over all ranks, which have joined before (check_groups tells whether a batch can have them).
    Parameters stay the same objects, and what is converted already stays as it is. Raises UserError for "machine" where
    machines have different numbers of processes.
    """
    if kind == "split":
        _replace(module, functools.partial(_SplitBatchNorm, groups=groups))
    elif kind != "plain" and world_size() > 1:
        peers = of_machine() if kind == "machine" else ALL
        _replace(module, functools.partial(_SyncBatchNorm, peers=peers))
    return module


def _replace(module: nn.Module, by: Callable[[nn.BatchNorm1d | nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, by(child))
        else:
            _replace(child, by)


def is_split(module: nn.Module) -> bool:
    """Does a batch norm in it take its statistics over groups of images?"""
    return any(isinstance(child, _SplitBatchNorm) for child in module.modules())


def is_synchronised(module: nn.Module) -> bool:
    """Does a batch norm in it take its statistics over several processes?"""
    return any(isinstance(child, _SyncBatchNorm) for child in module.modules())


def has_batch_norm(module: nn.Module) -> bool:
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | _BatchNorm
    return any(isinstance(child, kinds) for child in module.modules())


class RunningStatistics:
    """The running statistics of every batch norm in a module, so that a step that is skipped can take its own back."""

    def __init__(self, module: nn.Module) -> None:
        self._groups = [_named(module, "running_mean", "running_var"), _named(module, "num_batches_tracked")]
        self.save()

    def save(self) -> None:
        """Remember them as they are now."""
        self._saved = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def keep_if(self, good: Tensor) -> None:
        """Put back what was saved unless `good` (0-dim bool on the device)."""
        for group, saved in zip(self._groups, self._saved, strict=True):
            if group:
                chosen = torch.where(good, _flat(group), saved).split([buffer.numel() for buffer in group])
                torch._foreach_copy_(group, [part.view_as(b) for part, b in zip(chosen, group, strict=True)])


def _named(module: nn.Module, *names: str) -> list[Tensor]:
    found = (child._buffers.get(name) for child in module.modules() for name in names)
    return [buffer for buffer in found if buffer is not None]


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers] or [torch.empty(0)])
