# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs = false
"""The Triton kernels over tiles of similarities; gpu.py launches them.

What Triton compiles has no Python types. For parts of one tile it would compile a kernel anew, without its loop, and
ptxas serialise the products or spill: hence do_not_specialize.
"""

import triton
import triton.language as tl


@triton.jit
def _load(matrix_ptr, row_R, rows, d_D, D: tl.constexpr, EVEN: tl.constexpr):
    """A tile (R, D) of a matrix of so many rows; zeros beyond its end."""
    at_RD = matrix_ptr + row_R.to(tl.int64)[:, None] * D + d_D[None, :]
    in_matrix_RD = None if EVEN else (row_R < rows)[:, None] & (d_D < D)[None, :]
    return tl.load(at_RD, mask=in_matrix_RD, other=None if EVEN else 0.0)


@triton.jit(do_not_specialize=["tiles_per_part"])
def part_kernel(
    x_ptr, queue_ptr, temperature_ptr, top_ptr, total_ptr, sum_ptr, rows, keys, own, temperature_stride, tiles_per_part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, AVERAGE: tl.constexpr,
    OWN: tl.constexpr, EVEN: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of rows against one part of the queue: each row's maximum (base 2), sum, and average."""
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
        keys_KD = _load(queue_ptr, key_K, keys, d_D, D, EVEN)
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
        if AVERAGE:
            sum_RD = tl.dot(p_RK.to(keys_KD.dtype), keys_KD, sum_RD * shrink_R[:, None], input_precision=PRODUCTS)
        top_R = new_top_R

    at_R = part * rows + row_R
    tl.store(top_ptr + at_R, top_R, mask=in_rows_R)
    tl.store(total_ptr + at_R, total_R, mask=in_rows_R)
    if AVERAGE:
        tl.store(sum_ptr + at_R.to(tl.int64)[:, None] * D + d_D[None, :], sum_RD, mask=in_x_RD)


@triton.jit
def combine_kernel(
    top_ptr, total_ptr, sum_ptr, lse_ptr, out_ptr, maximum_ptr, rows, parts, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """One row: its parts' maxima, sums and, if AVERAGE, weighted sums made one."""
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
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)
    # A maximum passes over what is not a number, which the sum does not.
    tl.store(maximum_ptr + row, tl.where(total == total, top, total) * 0.6931471805599453)
    if AVERAGE:
        in_sum_PD = in_parts_P[:, None] & (d_D < D)[None, :]
        sum_PD = tl.load(sum_ptr + at_P.to(tl.int64)[:, None] * D + d_D[None, :], mask=in_sum_PD, other=0.0)
        tl.store(out_ptr + row * D + d_D, tl.sum(weight_P[:, None] * sum_PD, 0) / total, mask=d_D < D)


@triton.jit(do_not_specialize=["tiles_per_part"])
def backward_kernel(
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
        keys_KD = _load(queue_ptr, key_K, keys, d_D, D, EVEN)
        s_RK = tl.dot(x_RD, tl.trans(keys_KD), input_precision=PRODUCTS) * scale_R[:, None]
        p_RK = tl.exp2(s_RK - lse_R[:, None])
        if not EVEN:
            p_RK = tl.where((key_K < keys)[None, :], p_RK, 0.0)
        if OWN:
            p_RK = tl.where((row_R + own)[:, None] == key_K[None, :], 0.0, p_RK)
        p_RK *= tl.dot(grad_RD, tl.trans(keys_KD), input_precision=PRODUCTS) - mean_R[:, None]
        sum_RD = tl.dot(p_RK.to(keys_KD.dtype), keys_KD, sum_RD, input_precision=PRODUCTS)

    tl.store(sum_ptr + (part * rows + row_R).to(tl.int64)[:, None] * D + d_D[None, :], sum_RD, mask=in_x_RD)


@triton.jit(do_not_specialize=["tiles_per_part"])
def keys_backward_kernel(
    x_ptr, keys_ptr, temperature_ptr, lse_ptr, weight_ptr, sum_ptr, rows, keys, own, tiles_per_part,
    temperature_stride: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, SHIFT: tl.constexpr, OWN: tl.constexpr, EVEN: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of keys against one part of the rows: Σ_i 2^SHIFT p_ij weight_i x_i over the part.

    What keys beyond the end get may overflow, and is not stored.
    """
    part = tl.program_id(1)
    key_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d_D = tl.arange(0, BLOCK_D)
    keys_KD = _load(keys_ptr, key_K, keys, d_D, D, False)

    sum_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first = part * tiles_per_part * BLOCK_R
    last = tl.minimum(first + tiles_per_part * BLOCK_R, rows)
    for start in range(first, last, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        at_R = tl.minimum(row_R, rows - 1)  # instead of masks, which take registers
        x_RD = _load(x_ptr, at_R, rows, d_D, D, EVEN)
        if temperature_stride == 0:  # one for all: a number takes fewer registers than a row of a tile
            scale = 1.4426950408889634 / tl.load(temperature_ptr)
        else:
            scale = (1.4426950408889634 / tl.load(temperature_ptr + at_R * temperature_stride))[None, :]
        offset_R = tl.load(lse_ptr + at_R) * 1.4426950408889634 - SHIFT
        weight_R = tl.where(row_R < rows, tl.load(weight_ptr + at_R), 0.0)
        s_KR = tl.dot(keys_KD, tl.trans(x_RD), input_precision=PRODUCTS)
        p_KR = tl.exp2(s_KR * scale - offset_R[None, :]) * weight_R[None, :]
        if OWN:
            p_KR = tl.where((row_R + own)[None, :] == key_K[:, None], 0.0, p_KR)
        sum_KD = tl.dot(p_KR.to(x_RD.dtype), x_RD, sum_KD, input_precision=PRODUCTS)

    in_keys_KD = (key_K < keys)[:, None] & (d_D < D)[None, :]
    tl.store(sum_ptr + (part * keys + key_K).to(tl.int64)[:, None] * D + d_D[None, :], sum_KD, mask=in_keys_KD)


@triton.jit(do_not_specialize=["tiles_per_part"])
def nearest_kernel(
    x_ptr, queue_ptr, top_ptr, index_ptr, rows, keys, tiles_per_part, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """One block of rows against one part of the queue: each row's largest similarity, and the first key that has it."""
    part = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.arange(0, BLOCK_D)
    x_RD = _load(x_ptr, row_R, rows, d_D, D, False)

    first = part * tiles_per_part * BLOCK_K
    last = tl.minimum(first + tiles_per_part * BLOCK_K, keys)
    # Place by place of a tile, the largest so far and the tile it is from: rows are compared once, at the end.
    top_RK = tl.full([BLOCK_R, BLOCK_K], float("-inf"), tl.float32)
    tile_RK = tl.full([BLOCK_R, BLOCK_K], first, tl.int32)
    for start in range(first, last, BLOCK_K):
        key_K = start + tl.arange(0, BLOCK_K)
        keys_KD = _load(queue_ptr, key_K, keys, d_D, D, EVEN)
        s_RK = tl.dot(x_RD, tl.trans(keys_KD), input_precision=PRODUCTS)
        s_RK = tl.where(s_RK == s_RK, s_RK, float("inf"))  # a maximum would pass over what is not a number
        if not EVEN:
            s_RK = tl.where((key_K < keys)[None, :], s_RK, float("-inf"))
        larger_RK = s_RK > top_RK
        top_RK = tl.where(larger_RK, s_RK, top_RK)
        tile_RK = tl.where(larger_RK, start, tile_RK)

    top_R = tl.max(top_RK, 1)
    key_RK = tile_RK + tl.arange(0, BLOCK_K)[None, :]
    index_R = tl.min(tl.where(top_RK == top_R[:, None], key_RK, 2147483647), 1)
    at_R = part * rows + row_R
    tl.store(top_ptr + at_R, top_R, mask=row_R < rows)
    tl.store(index_ptr + at_R, index_R, mask=row_R < rows)
