"""NT-Xent (SimCLR, arXiv 2002.05709, eq. 1) over a batch, whose gradient goes to both sides: ours and plain torch's.

z (2N, D), normalised: the first views of N images, then their second views. Every row is compared with all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import log_sum_exp

TAU = 0.5
DIM = 128
_AT_ONCE = 512  # rows of the matrix in fp64


def ours(z: Tensor) -> Tensor:
    return (log_sum_exp(z, z, TAU, own=0) - _positive(z)).mean()


def eager(z: Tensor) -> Tensor:
    """As it is written everywhere: the matrix, its diagonal masked, a log-sum-exp."""
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    s = (z @ z.T / TAU).float().masked_fill(itself, -math.inf)
    return (s.logsumexp(1) - _positive(z)).mean()


def _positive(z: Tensor) -> Tensor:
    """Similarity to the other view, in fp32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return (z * z.roll(len(z) // 2, 0)).sum(1) / TAU


def make_inputs(n: int, device: str, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Two, that caches may hold: a loss finds its features where the network left them."""
    generator = torch.Generator(device).manual_seed(0)
    features = (torch.randn(2 * n, DIM, device=device, generator=generator) for _ in range(2))
    return [(F.normalize(z, dim=1).to(dtype).requires_grad_(),) for z in features]


def exact(z: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient in fp64, some rows of the matrix at a time."""
    z = z.detach().double().requires_grad_()
    loss, gradient = 0.0, torch.zeros_like(z)
    for first in range(0, len(z), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        s = z[rows] @ z.T / TAU
        itself = torch.arange(len(z), device=z.device) == torch.arange(len(z), device=z.device)[rows, None]
        part = (s.masked_fill(itself, -math.inf).logsumexp(1) - _positive(z)[rows]).sum() / len(z)
        loss += float(part.detach())
        gradient += torch.autograd.grad(part, z)[0]
    return loss, gradient
