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
from torch import Tensor

from fasttrain.kernels.similarity.gpu_kernels import (
    backward_kernel,
    combine_kernel,
    keys_backward_kernel,
    nearest_kernel,
    part_kernel,
)

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on CPU tensors too
_MOST_PARTS = 128
_SHIFT = 15


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
    return queue_KD.shape[0] % tiles.keys == 0 and _full(queue_KD.shape[1])


def _full(dim: int) -> bool:
    """Whether rows fill those of a tile."""
    return dim >= 16 and dim == triton.next_power_of_2(dim)


def readout(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, average: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, O and the maximum. Arguments as of kernels.similarity.readout, checked and contiguous; own: -1 for none.

    Without `average` O has no rows.
    """
    rows, dim = x_RD.shape
    tiles = tiles_for(rows, dim, x_RD.element_size())
    parts, tiles_per_part = _split(rows, queue_KD.shape[0], tiles, x_RD.device)
    averaged = rows if average else 0
    lse_R, maximum_R = (torch.empty(rows, device=x_RD.device) for _ in range(2))
    out_RD = torch.empty((averaged, dim), device=x_RD.device)
    top_PR, total_PR = (torch.empty((parts, rows), device=x_RD.device) for _ in range(2))
    sum_PRD = torch.empty((parts, averaged, dim), device=x_RD.device)
    if not rows:
        return lse_R, out_RD, maximum_R
    with torch.cuda.device_of(x_RD):  # Triton launches on the current device
        part_kernel[(triton.cdiv(rows, tiles.rows), parts)](
            x_RD, queue_KD, temperature_R, top_PR, total_PR, sum_PRD,
            rows, queue_KD.shape[0], own, temperature_R.stride(0), tiles_per_part,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=tiles.rows, BLOCK_K=tiles.keys,
            AVERAGE=average, OWN=own >= 0, EVEN=_even(queue_KD, tiles), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        combine_kernel[(rows,)](
            top_PR, total_PR, sum_PRD, lse_R, out_RD, maximum_R, rows, parts,
            D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_P=triton.next_power_of_2(parts), AVERAGE=average,
            num_warps=4,
        )  # fmt: skip
    return lse_R, out_RD, maximum_R


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
        backward_kernel[(triton.cdiv(rows, tiles.rows), parts)](
            x_RD, queue_KD, temperature_R, lse_R, grad_out_RD, mean_R, sum_PRD,
            rows, queue_KD.shape[0], own, temperature_R.stride(0), tiles_per_part,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=tiles.rows, BLOCK_K=tiles.keys,
            OWN=own >= 0, EVEN=_even(queue_KD, tiles), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return sum_PRD.sum(0) / temperature_R[:, None]


def keys_backward(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, lse_R: Tensor, weight_R: Tensor
) -> Tensor:
    """Σ_i weight_i p_ij x_i: a block of keys is held, and the rows are read in parts."""
    (rows, dim), keys = x_RD.shape, keys_KD.shape[0]
    if not rows:
        return torch.zeros_like(keys_KD, dtype=torch.float32)
    tiles = tiles_for(keys, dim, x_RD.element_size())
    parts, tiles_per_part = _split(keys, rows, tiles, x_RD.device)
    sum_PKD = torch.empty((parts, keys, dim), device=x_RD.device)
    # What is rounded to 16 bits is p·weight, as small as 1/(R·K). With 2^15 p and weights up to 1 fp16's range is used.
    most = weight_R.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    with torch.cuda.device_of(x_RD):
        keys_backward_kernel[(triton.cdiv(keys, tiles.rows), parts)](
            x_RD, keys_KD, temperature_R, lse_R, weight_R / most, sum_PKD,
            rows, keys, own, tiles_per_part, temperature_R.stride(0),
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_K=tiles.rows, BLOCK_R=tiles.keys,
            SHIFT=_SHIFT, OWN=own >= 0, EVEN=_full(dim), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return sum_PKD.sum(0) * (most / 2**_SHIFT)


def nearest(x_RD: Tensor, queue_KD: Tensor) -> Tensor:
    """Arguments as of kernels.similarity.nearest.nearest, checked and contiguous."""
    rows, dim = x_RD.shape
    if not rows:
        return torch.empty((0,), dtype=torch.int64, device=x_RD.device)
    tiles = tiles_for(rows, dim, x_RD.element_size())
    parts, tiles_per_part = _split(rows, queue_KD.shape[0], tiles, x_RD.device)
    top_PR = torch.empty((parts, rows), device=x_RD.device)
    index_PR = torch.empty((parts, rows), dtype=torch.int32, device=x_RD.device)
    with torch.cuda.device_of(x_RD):
        nearest_kernel[(triton.cdiv(rows, tiles.rows), parts)](
            x_RD, queue_KD, top_PR, index_PR, rows, queue_KD.shape[0], tiles_per_part,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=tiles.rows, BLOCK_K=tiles.keys,
            EVEN=_even(queue_KD, tiles), PRODUCTS=_products(x_RD.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return index_PR.gather(0, top_PR.argmax(0, keepdim=True))[0].long()  # of equal parts the first
