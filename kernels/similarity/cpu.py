"""The readout and the look-up on a CPU: products of torch over tiles that stay in the cache, with an online softmax.

The softmax is carried over the tiles as in Milakov and Gimelshein 2018 (arXiv 1805.02867): a running maximum, sum and
weighted average, rescaled whenever the maximum grows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, KEYS = 512, 1024  # of a tile: 2 MiB of fp32, a core's own cache (measured: docs/log.md)
SIDE = 256  # of a square tile: a matrix of few rows, too, must have tiles below its diagonal, which are left out


def in_one_tile(x_RD: Tensor, keys_KD: Tensor) -> bool:
    """Whether all similarities are no more than a tile's, which then is better kept than computed again."""
    return x_RD.shape[0] * keys_KD.shape[0] <= ROWS * KEYS


def readout(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, average: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, O and the maximum. Arguments as of kernels.similarity.readout, checked; own: -1 for none.

    Without `average` O has no rows.
    """
    lse_R, maximum_R = (temperature_R.new_empty(x_RD.shape[0]) for _ in range(2))
    out_RD = temperature_R.new_empty((x_RD.shape[0] if average else 0, x_RD.shape[1]))
    for first in range(0, x_RD.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        x_rD = _scaled(x_RD, temperature_R, rows)
        top_r1 = lse_R.new_full((x_rD.shape[0], 1), -torch.inf)
        total_r1, sum_rD = torch.zeros_like(top_r1), torch.zeros_like(x_rD)
        for s_rk, keys_kD, _ in _tiles(x_rD, queue_KD, own + first if own >= 0 else -1):
            shrink_r1 = _carry(top_r1, total_r1, s_rk, out=s_rk)
            if average:
                sum_rD = torch.addmm(sum_rD.mul_(shrink_r1), s_rk, keys_kD, out=sum_rD)
        lse_R[rows], maximum_R[rows] = (top_r1 + total_r1.log())[:, 0], top_r1[:, 0]
        if average:
            out_RD[rows] = sum_rD.div_(total_r1)
    return lse_R, out_RD, maximum_R


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
        for s_rk, keys_kD, _ in _tiles(_scaled(x_RD, temperature_R, rows), queue_KD, own + first if own >= 0 else -1):
            p_rk = s_rk.sub_(lse_R[rows, None]).exp_()
            sum_rD.addmm_(p_rk.mul_(torch.mm(g_rD, keys_kD.T).sub_(mean_r1)), keys_kD)
        grad_RD[rows] = sum_rD.div_(temperature_R[rows, None])
    return grad_RD


def keys_backward(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, lse_R: Tensor, weight_R: Tensor
) -> Tensor:
    """Σ_i weight_i p_ij x_i."""
    sum_DK = lse_R.new_zeros(keys_KD.shape[::-1])  # in this order neither factor of a product is transposed
    for first in range(0, x_RD.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        weighted_Dr = (x_RD[rows].to(lse_R.dtype) * weight_R[rows, None]).T.contiguous()
        for s_rk, _, keys in _tiles(_scaled(x_RD, temperature_R, rows), keys_KD, own + first if own >= 0 else -1):
            sum_DK[:, keys].addmm_(weighted_Dr, s_rk.sub_(lse_R[rows, None]).exp_())
    return sum_DK.T.contiguous()


def symmetric(x_RD: Tensor, temperature: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """log Σ_j exp(x_i·x_j/τ) and max_j x_i·x_j/τ over the rows themselves; if `own`, over j ≠ i.

    Half of the matrix serves both halves.
    """
    top_R1 = temperature.new_full((x_RD.shape[0], 1), -torch.inf)
    total_R1 = torch.zeros_like(top_R1)
    other = temperature.new_empty(min(SIDE, x_RD.shape[0]) ** 2)
    for rows, columns, s_rc, _, _ in _square_tiles(x_RD, temperature, own):
        if columns != rows:
            _carry(top_R1[columns], total_R1[columns], s_rc.T, out=_shaped(other, s_rc).T)
        _carry(top_R1[rows], total_R1[rows], s_rc, out=s_rc)
    return (top_R1 + total_R1.log())[:, 0], top_R1[:, 0]


def symmetric_backward(x_RD: Tensor, temperature: Tensor, own: bool, lse_R: Tensor, weight_R: Tensor) -> Tensor:
    """Σ_j (weight_i p_ij + weight_j p_ji) x_j."""
    grad_RD = torch.zeros(x_RD.shape, dtype=lse_R.dtype)
    other = lse_R.new_empty(min(SIDE, x_RD.shape[0]) ** 2)
    for rows, columns, s_rc, x_rD, x_cD in _square_tiles(x_RD, temperature, own):
        p_rc = torch.sub(s_rc, lse_R[columns], out=_shaped(other, s_rc)).exp_().mul_(weight_R[columns])
        p_rc += s_rc.sub_(lse_R[rows, None]).exp_().mul_(weight_R[rows, None])
        grad_RD[rows].addmm_(p_rc, x_cD)
        if columns != rows:
            grad_RD[columns].addmm_(p_rc.T, x_rD)
    return grad_RD


def nearest(x_RD: Tensor, queue_KD: Tensor) -> Tensor:
    """Arguments as of kernels.similarity.nearest.nearest, checked."""
    index_R = torch.zeros(x_RD.shape[0], dtype=torch.int64)
    for first in range(0, x_RD.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        x_rD = x_RD[rows].to(torch.promote_types(x_RD.dtype, torch.float32))
        top_r = x_rD.new_full(x_rD.shape[:1], -torch.inf)
        for s_rk, _, keys in _tiles(x_rD, queue_KD, -1):
            new_top_r, new_index_r = s_rk.max(1)
            larger_r = (new_top_r > top_r) | new_top_r.isnan() & ~top_r.isnan()
            index_R[rows][larger_r] = new_index_r[larger_r] + keys.start
            top_r = torch.where(larger_r, new_top_r, top_r)
    return index_R


def _carry(top_r1: Tensor, total_r1: Tensor, s_rk: Tensor, out: Tensor) -> Tensor:
    """Takes one more tile into the rows' maxima and sums, in place, and writes its exponentials to `out`.

    Returns what sums so far were multiplied by.
    """
    new_top_r1 = torch.maximum(top_r1, s_rk.amax(1, keepdim=True))
    # Where all so far is -inf, 0 stands in for the maximum: -inf - -inf is not a number.
    finite_r1 = new_top_r1.masked_fill(new_top_r1 == -torch.inf, 0)
    shrink_r1 = (top_r1 - finite_r1).exp_()
    total_r1.mul_(shrink_r1).add_(torch.sub(s_rk, finite_r1, out=out).exp_().sum(1, keepdim=True))
    top_r1.copy_(new_top_r1)
    return shrink_r1


def _scaled(x_RD: Tensor, temperature_R: Tensor, rows: slice) -> Tensor:
    return x_RD[rows].to(temperature_R.dtype) / temperature_R[rows, None]


def _tiles(x_rD: Tensor, queue_KD: Tensor, own: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Similarities (r, k) of the scaled rows to each tile of the queue, -inf at a row's own key; the tile (k, D); its
    place.

    The memory of the similarities is used again for the next tile.
    """
    buffer = x_rD.new_empty(x_rD.shape[0] * min(KEYS, queue_KD.shape[0]))
    for first in range(0, queue_KD.shape[0], KEYS):
        keys = slice(first, first + KEYS)
        keys_kD = queue_KD[keys].to(x_rD.dtype)
        s_rk = buffer[: x_rD.shape[0] * keys_kD.shape[0]].view(x_rD.shape[0], keys_kD.shape[0])
        torch.mm(x_rD, keys_kD.T, out=s_rk)
        if own >= 0 and -s_rk.shape[0] < own - first < s_rk.shape[1]:
            s_rk.diagonal(own - first).fill_(-torch.inf)
        yield s_rk, keys_kD, keys


def _square_tiles(
    x_RD: Tensor, temperature: Tensor, own: bool
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Places and similarities (r, c) of the tiles on and above the diagonal, and the rows and columns themselves.

    The memory of the similarities is used again for the next tile.
    """
    x_RD = x_RD.to(temperature.dtype)
    blocks = [slice(first, first + SIDE) for first in range(0, x_RD.shape[0], SIDE)]
    buffer = x_RD.new_empty(min(SIDE, x_RD.shape[0]) ** 2)
    for at, rows in enumerate(blocks):
        x_rD = x_RD[rows]
        scaled_rD = x_rD / temperature
        for columns in blocks[at:]:
            x_cD = x_RD[columns]
            s_rc = buffer[: len(x_rD) * len(x_cD)].view(len(x_rD), len(x_cD))
            torch.mm(scaled_rD, x_cD.T, out=s_rc)
            if own and columns == rows:
                s_rc.fill_diagonal_(-torch.inf)
            yield rows, columns, s_rc, x_rD, x_cD


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)
