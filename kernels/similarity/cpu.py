"""The readout on a CPU: products of torch over tiles that stay in the cache, with an online softmax.

The softmax is carried over the tiles as in Milakov and Gimelshein 2018 (arXiv 1805.02867): a running maximum, sum and
weighted average, rescaled whenever the maximum grows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, KEYS = 512, 1024  # of a tile: 2 MiB of fp32, a core's own cache (measured: docs/log.md)


def readout(x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Arguments as of kernels.similarity.readout.readout, checked; own: -1 for none."""
    lse_R, out_RD = temperature_R.new_empty(x_RD.shape[0]), temperature_R.new_empty(x_RD.shape)
    for first in range(0, x_RD.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        x_rD = _scaled(x_RD, temperature_R, rows)
        top_r1 = lse_R.new_full((x_rD.shape[0], 1), -torch.inf)
        total_r1, sum_rD = torch.zeros_like(top_r1), torch.zeros_like(x_rD)
        for s_rk, keys_kD in _tiles(x_rD, queue_KD, own + first if own >= 0 else -1):
            new_top_r1 = torch.maximum(top_r1, s_rk.amax(1, keepdim=True))
            # Where all so far is -inf, 0 stands in for the maximum: -inf - -inf is not a number.
            finite_r1 = new_top_r1.masked_fill(new_top_r1 == -torch.inf, 0)
            shrink_r1 = (top_r1 - finite_r1).exp_()
            p_rk = s_rk.sub_(finite_r1).exp_()
            total_r1 = total_r1.mul_(shrink_r1).add_(p_rk.sum(1, keepdim=True))
            sum_rD = torch.addmm(sum_rD.mul_(shrink_r1), p_rk, keys_kD, out=sum_rD)
            top_r1 = new_top_r1
        lse_R[rows] = (top_r1 + total_r1.log())[:, 0]
        out_RD[rows] = sum_rD.div_(total_r1)
    return lse_R, out_RD


def readout_backward(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, lse_R: Tensor, out_RD: Tensor, grad_out_RD: Tensor
) -> Tensor:
    """Σ_j p_ij (g_i·Q_j − g_i·O_i) Q_j / τ_i."""
    grad_RD = torch.empty_like(out_RD)
    for first in range(0, x_RD.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        g_rD = grad_out_RD[rows]
        mean_r1 = (g_rD * out_RD[rows]).sum(1, keepdim=True)
        sum_rD = torch.zeros_like(g_rD)
        for s_rk, keys_kD in _tiles(_scaled(x_RD, temperature_R, rows), queue_KD, own + first if own >= 0 else -1):
            p_rk = s_rk.sub_(lse_R[rows, None]).exp_()
            sum_rD.addmm_(p_rk.mul_(torch.mm(g_rD, keys_kD.T).sub_(mean_r1)), keys_kD)
        grad_RD[rows] = sum_rD.div_(temperature_R[rows, None])
    return grad_RD


def _scaled(x_RD: Tensor, temperature_R: Tensor, rows: slice) -> Tensor:
    return x_RD[rows].to(temperature_R.dtype) / temperature_R[rows, None]


def _tiles(x_rD: Tensor, queue_KD: Tensor, own: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities (r, k) of the scaled rows to each tile of the queue, -inf at a row's own key, and the tile (k, D).

    The memory of the similarities is used again for the next tile.
    """
    buffer = x_rD.new_empty(x_rD.shape[0] * min(KEYS, queue_KD.shape[0]))
    for first in range(0, queue_KD.shape[0], KEYS):
        keys_kD = queue_KD[first : first + KEYS].to(x_rD.dtype)
        s_rk = buffer[: x_rD.shape[0] * keys_kD.shape[0]].view(x_rD.shape[0], keys_kD.shape[0])
        torch.mm(x_rD, keys_kD.T, out=s_rk)
        if own >= 0 and -s_rk.shape[0] < own - first < s_rk.shape[1]:
            s_rk.diagonal(own - first).fill_(-torch.inf)
        yield s_rk, keys_kD
