"""The momentum (key) encoder and the queue of keys (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, current: nn.Module, momentum: float) -> None:
    """average ← momentum·average + (1 − momentum)·current over all parameters, in place, one fused pass."""
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - momentum)


class Queue(nn.Module):
    """The last K keys, L2-normalised rows (K, D); saved with the model, never read by the host."""

    keys_KD: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys_KD", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, new_ND: Tensor) -> None:
        """Replace the oldest keys by `new_ND`, wrapping at the end; of more than K new keys the last K stay."""
        size = self.keys_KD.shape[0]
        kept_ND = new_ND[-size:]
        first = new_ND.shape[0] - kept_ND.shape[0]
        rows_N = (self.pointer + torch.arange(first, new_ND.shape[0], device=new_ND.device)) % size
        self.keys_KD.index_copy_(0, rows_N, kept_ND.to(self.keys_KD.dtype))
        self.pointer.copy_((self.pointer + new_ND.shape[0]) % size)
