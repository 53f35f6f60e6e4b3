"""The readout in Triton: tiles of similarities live in registers only.

A grid over rows alone would leave most of a large GPU idle (256 rows are four blocks), so the queue is split too;
the parts are combined, in a fixed order and without atomics, by a second small kernel. The softmax is carried over the
tiles as in FlashAttention-2 (Dao 2023, arXiv 2307.08691), in base 2; here keys and values are one tile, read once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on CPU tensors too
_MOST_PARTS = 128


@dataclass(frozen=True)
class Tiles:
    """Block shape, and how a program is run: warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles_for(rows: int, dim: int, itemsize: int) -> Tiles:
    """Chosen by what the compiler makes of them for Hopper (benchmarks/compile_hopper.py).

    In 16 bits nothing spills, no product waits for registers (ptxas would serialise it), and at dim 128 two programs or
    more fit a multiprocessor, so that one's products overlap the other's exponentials. In fp32 nothing spills where
    tiles fill the queue and products are exact; larger tiles spill kilobytes.
    """
    if itemsize == 4:
        return Tiles(32, 32, 8, 2) if dim <= 128 else Tiles(16, 16, 8, 2)
    if rows <= 16:
        return Tiles(16, 64, 4, 3)
    if dim > 128:
        return Tiles(64, 32, 8, 3)
    # Few rows need small blocks to fill the device; many need large ones, which read the L2 cache less often.
    return Tiles(64, 64, 4, 3) if rows <= 512 else Tiles(128, 32, 8, 3)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _split(rows: int, keys: int, tiles: Tiles, device: torch.device) -> tuple[int, int]:
    """How many parts the queue is read in, and the tiles of each: about two programs per multiprocessor."""
    all_tiles = triton.cdiv(keys, tiles.keys)
    wanted = max(1, 2 * _multiprocessors(device) // max(1, triton.cdiv(rows, tiles.rows)))
    tiles_per_part = triton.cdiv(all_tiles, min(wanted, _MOST_PARTS, all_tiles))
    return triton.cdiv(all_tiles, tiles_per_part), tiles_per_part


def _products(dtype: torch.dtype) -> str:
    """How fp32 is multiplied; other types have one way."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32x3"


def _even(queue_KD: Tensor, tiles: Tiles) -> bool:
    """Whether tiles fill the queue exactly, so that nothing needs a mask."""
    keys, dim = queue_KD.shape
    return keys % tiles.keys == 0 and dim >= 16 and dim == triton.next_power_of_2(dim)


def readout(x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Arguments as of kernels.similarity.readout.readout, checked and contiguous; own: -1 for none."""
    rows, dim = x_RD.shape
    tiles = tiles_for(rows, dim, x_RD.element_size())
    parts, tiles_per_part = _split(rows, queue_KD.shape[0], tiles, x_RD.device)
    lse_R, out_RD = (torch.empty(shape, device=x_RD.device) for shape in ((rows,), (rows, dim)))
    top_PR, total_PR = (torch.empty((parts, rows), device=x_RD.device) for _ in range(2))
    sum_PRD = torch.empty((parts, rows, dim), device=x_RD.device)
    if not rows:
        return lse_R, out_RD
    with torch.cuda.device_of(x_RD):  # Triton launches on the current device
        _part_kernel[(triton.cdiv(rows, tiles.rows), parts)](
            x_RD, queue_KD, temperature_R, top_PR, total_PR, sum_PRD,
            rows, queue_KD.shape[0], own, temperature_R.stride(0), tiles_per_part,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=tiles.rows, BLOCK_K=tiles.keys,
            OWN=own >= 0, EVEN=_even(queue_KD, tiles), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        _combine_kernel[(rows,)](
            top_PR, total_PR, sum_PRD, lse_R, out_RD, rows, parts,
            D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_P=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return lse_R, out_RD


def readout_backward(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, lse_R: Tensor, out_RD: Tensor, grad_out_RD: Tensor
) -> Tensor:
    """Σ_j p_ij (g_i·Q_j − g_i·O_i) Q_j / τ_i."""
    rows, dim = x_RD.shape
    if not rows:
        return torch.empty_like(out_RD)
    tiles = tiles_for(min(rows, 512), dim, x_RD.element_size())  # no large blocks: two of rows are held here
    parts, tiles_per_part = _split(rows, queue_KD.shape[0], tiles, x_RD.device)
    sum_PRD = torch.empty((parts, rows, dim), device=x_RD.device)
    grad_out_RD = grad_out_RD.to(x_RD.dtype)  # rounded before both uses, so that what cancels below does so exactly
    mean_R = (grad_out_RD * out_RD).sum(1)
    with torch.cuda.device_of(x_RD):
        _backward_kernel[(triton.cdiv(rows, tiles.rows), parts)](
            x_RD, queue_KD, temperature_R, lse_R, grad_out_RD, mean_R, sum_PRD,
            rows, queue_KD.shape[0], own, temperature_R.stride(0), tiles_per_part,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=tiles.rows, BLOCK_K=tiles.keys,
            OWN=own >= 0, EVEN=_even(queue_KD, tiles), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return sum_PRD.sum(0) / temperature_R[:, None]


@triton.jit
def _load_keys(queue_ptr, key_K, keys, d_D, D: tl.constexpr, EVEN: tl.constexpr):
    """A tile (K, D) of the queue; zeros beyond its end."""
    at_KD = queue_ptr + key_K.to(tl.int64)[:, None] * D + d_D[None, :]
    in_queue_KD = None if EVEN else (key_K < keys)[:, None] & (d_D < D)[None, :]
    return tl.load(at_KD, mask=in_queue_KD, other=None if EVEN else 0.0)


@triton.jit
def _part_kernel(
    x_ptr, queue_ptr, temperature_ptr, top_ptr, total_ptr, sum_ptr, rows, keys, own, temperature_stride, tiles_per_part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
    EVEN: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of rows against one part of the queue: each row's maximum (base 2), sum and weighted sum."""
    part = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.arange(0, BLOCK_D)
    in_rows_R = row_R < rows
    in_x_RD = in_rows_R[:, None] & (d_D < D)[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * D + d_D[None, :], mask=in_x_RD, other=0.0)
    scale_R = 1.4426950408889634 / tl.load(temperature_ptr + row_R * temperature_stride, mask=in_rows_R, other=1.0)

    top_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total_R = tl.zeros([BLOCK_R], tl.float32)
    sum_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = part * tiles_per_part * BLOCK_K
    last = tl.minimum(first + tiles_per_part * BLOCK_K, keys)
    for start in range(first, last, BLOCK_K):
        key_K = start + tl.arange(0, BLOCK_K)
        keys_KD = _load_keys(queue_ptr, key_K, keys, d_D, D, EVEN)
        s_RK = tl.dot(x_RD, tl.trans(keys_KD), input_precision=PRODUCTS)
        if not EVEN:
            s_RK = tl.where((key_K < keys)[None, :], s_RK, float("-inf"))
        if OWN:
            s_RK = tl.where((row_R + own)[:, None] == key_K[None, :], float("-inf"), s_RK)
        new_top_R = tl.maximum(top_R, tl.max(s_RK, 1) * scale_R)
        # Where all so far is -inf, 0 stands in for the maximum: -inf - -inf is not a number.
        finite_R = tl.where(new_top_R == float("-inf"), 0.0, new_top_R)
        shrink_R = tl.exp2(top_R - finite_R)
        p_RK = tl.exp2(s_RK * scale_R[:, None] - finite_R[:, None])
        total_R = total_R * shrink_R + tl.sum(p_RK, 1)
        sum_RD = tl.dot(p_RK.to(keys_KD.dtype), keys_KD, sum_RD * shrink_R[:, None], input_precision=PRODUCTS)
        top_R = new_top_R

    at_R = part * rows + row_R
    tl.store(top_ptr + at_R, top_R, mask=in_rows_R)
    tl.store(total_ptr + at_R, total_R, mask=in_rows_R)
    tl.store(sum_ptr + at_R.to(tl.int64)[:, None] * D + d_D[None, :], sum_RD, mask=in_x_RD)


@triton.jit
def _combine_kernel(
    top_ptr, total_ptr, sum_ptr, lse_ptr, out_ptr, rows, parts, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One row: its parts' maxima, sums and weighted sums made one."""
    row = tl.program_id(0)
    part_P = tl.arange(0, BLOCK_P)
    d_D = tl.arange(0, BLOCK_D)
    in_parts_P = part_P < parts
    at_P = part_P * rows + row
    top_P = tl.load(top_ptr + at_P, mask=in_parts_P, other=float("-inf"))
    top = tl.max(top_P, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight_P = tl.exp2(top_P - finite)
    total = tl.sum(weight_P * tl.load(total_ptr + at_P, mask=in_parts_P, other=0.0), 0)
    in_sum_PD = in_parts_P[:, None] & (d_D < D)[None, :]
    sum_PD = tl.load(sum_ptr + at_P.to(tl.int64)[:, None] * D + d_D[None, :], mask=in_sum_PD, other=0.0)
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(out_ptr + row * D + d_D, tl.sum(weight_P[:, None] * sum_PD, 0) / total, mask=d_D < D)


@triton.jit
def _backward_kernel(
    x_ptr, queue_ptr, temperature_ptr, lse_ptr, grad_ptr, mean_ptr, sum_ptr, rows, keys, own, temperature_stride,
    tiles_per_part, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    OWN: tl.constexpr, EVEN: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of rows against one part of the queue: Σ_j p_ij (g_i·Q_j − mean_i) Q_j over the part."""
    part = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.arange(0, BLOCK_D)
    in_rows_R = row_R < rows
    in_x_RD = in_rows_R[:, None] & (d_D < D)[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * D + d_D[None, :], mask=in_x_RD, other=0.0)
    grad_RD = tl.load(grad_ptr + row_R[:, None] * D + d_D[None, :], mask=in_x_RD, other=0.0)
    scale_R = 1.4426950408889634 / tl.load(temperature_ptr + row_R * temperature_stride, mask=in_rows_R, other=1.0)
    lse_R = tl.load(lse_ptr + row_R, mask=in_rows_R, other=0.0) * 1.4426950408889634
    mean_R = tl.load(mean_ptr + row_R, mask=in_rows_R, other=0.0)

    sum_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = part * tiles_per_part * BLOCK_K
    last = tl.minimum(first + tiles_per_part * BLOCK_K, keys)
    for start in range(first, last, BLOCK_K):
        key_K = start + tl.arange(0, BLOCK_K)
        keys_KD = _load_keys(queue_ptr, key_K, keys, d_D, D, EVEN)
        s_RK = tl.dot(x_RD, tl.trans(keys_KD), input_precision=PRODUCTS) * scale_R[:, None]
        p_RK = tl.exp2(s_RK - lse_R[:, None])
        if not EVEN:
            p_RK = tl.where((key_K < keys)[None, :], p_RK, 0.0)
        if OWN:
            p_RK = tl.where((row_R + own)[:, None] == key_K[None, :], 0.0, p_RK)
        p_RK *= tl.dot(grad_RD, tl.trans(keys_KD), input_precision=PRODUCTS) - mean_R[:, None]
        sum_RD = tl.dot(p_RK.to(keys_KD.dtype), keys_KD, sum_RD, input_precision=PRODUCTS)

    tl.store(sum_ptr + (part * rows + row_R).to(tl.int64)[:, None] * D + d_D[None, :], sum_RD, mask=in_x_RD)
