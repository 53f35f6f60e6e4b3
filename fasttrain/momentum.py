"""The momentum (key) encoder and the queue of keys (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, current: nn.Module, momentum: float, good: Tensor | None = None) -> None:
    """average ← average + (1 − momentum)·(current − average) over all parameters, in place.

    good: 0-dim bool on the device; where false, nothing changes. None: true.
    """
    averages: list[Tensor] = list(average.parameters())
    currents: list[Tensor] = list(current.parameters())
    if good is None or good.device.type == "cpu":  # a flag on the CPU can be looked at, and one fused pass is enough
        if good is None or good:
            torch._foreach_lerp_(averages, currents, 1 - momentum)
        return
    change = list(torch._foreach_sub(currents, averages))
    torch._foreach_mul_(change, (1 - momentum) * good)
    torch._foreach_add_(averages, change)


class Queue(nn.Module):
    """The last K keys, L2-normalised rows (K, D); saved with the model, never read by the host."""

    keys_KD: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys_KD", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, new_ND: Tensor, good: Tensor | None = None) -> None:
        """Replace the oldest keys by `new_ND`, wrapping at the end; of more than K new keys the last K stay.

        good: 0-dim bool on the device; where false, nothing changes. None: true.
        """
        size = self.keys_KD.shape[0]
        kept_ND = new_ND[-size:]
        first = new_ND.shape[0] - kept_ND.shape[0]
        rows_N = (self.pointer + torch.arange(first, new_ND.shape[0], device=new_ND.device)) % size
        kept_ND = kept_ND.to(self.keys_KD.dtype)
        if good is not None:
            kept_ND = torch.where(good, kept_ND, self.keys_KD[rows_N])
        self.keys_KD.index_copy_(0, rows_N, kept_ND)
        self.pointer.copy_((self.pointer + new_ND.shape[0] * (1 if good is None else good)) % size)
