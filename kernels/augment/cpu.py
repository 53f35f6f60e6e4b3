"""The augmentation compiled by numba for CPU cores: one pass over the source per view, then a cache-sized scratch.

A view is made in three float32 planes, because whole-plane loops vectorise. The planes are stored turned (column after
column): the resize works on bands of 16 rows, and the 16 values that lie below each other in a column are then one
vector. Writing turns the view back, interleaves and normalises it. Work is shared out over this module's own threads
(compiled code releases the interpreter lock), so torch's and numba's thread settings are neither used nor changed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

if TYPE_CHECKING:
    from fasttrain.views import ViewTable

Array = np.ndarray
Arrays = tuple[np.ndarray, ...]

# Sums may be reordered and fused, which is what lets LLVM vectorise them; nothing assumes away NaN or infinity.
# The numpy error model leaves out the check of every division, which would keep loops from being vectorised.
_compiled = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")

_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 4, 6))
_RED, _GREEN, _BLUE = (np.float32(x) for x in (0.2989, 0.587, 0.114))  # torchvision's weights of rgb_to_grayscale
_LANES = 16  # rows of a band, values of a vector: one register of AVX-512, a few of others
_LINE = 64  # bytes of a cache line, to which vectors are aligned
_TILE = 512  # columns of a band that are mixed and turned at once, so that they stay in the first-level cache
_BLOCK = 2048  # about as many pixels go through all colour operations together, for the same reason
_CHUNKS_PER_THREAD = 4  # evens out images of different sizes; a chunk is one call into compiled code
_thread = threading.local()
# How numba sees the output: it knows neither 16-bit float, so their bits are written (see _rounded_to).
_STORED_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    mean: Tensor,
    std: Tensor,
    out_VBSS3: Tensor,
) -> None:
    """Writes the normalised views into out_VBSS3, of float32, bfloat16 or float16 (rounded to nearest even).

    Arguments as for `kernels.augment.augment`, already checked.
    """
    views, images, size = out_VBSS3.shape[:3]
    longest = int(table.crop_BV4[..., 2:].max()) if images else 1
    taps = -(-(2 * math.ceil(max(longest / size, 1.0)) + 1) // 4) * 4  # four go at once
    radius = math.ceil(3 * float(table.sigma_BV.max())) if images else 0
    pitch = _rounded(size)
    sizes = {
        "view": 3 * size * pitch, "other": 3 * size * pitch, "weights": 2 * size * taps, "strip": _LANES * _TILE,
        "band": _LANES * (3 * longest + _TILE), "padded": pitch + 2 * _rounded(radius), "kernel": radius + 1,
    }  # fmt: skip
    source = _arrays(pixels, offset_B, width_B)
    scale = _arrays(mean.repeat(max(size, _LANES)), (1 / std).repeat(max(size, _LANES)))
    rows = _arrays(
        table.crop_BV4, table.flip_BV, table.order_BV4, table.strength_BV4, table.gray_BV, table.sigma_BV,
        table.solarize_BV,
    )  # fmt: skip
    out = out_VBSS3.view(_STORED_AS[out_VBSS3.dtype]).numpy().reshape(views, images, size * size * 3)
    threads = _threads()
    bounds = np.linspace(0, images * views, min(images * views, threads * _CHUNKS_PER_THREAD) + 1).astype(np.int64)

    def run(chunk: tuple[int, int]) -> None:
        _make_views(*chunk, source, rows, scale, (size, taps, radius), _divided(sizes), out)

    list(_pool(threads).map(run, zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))


def _threads() -> int:
    """The cores this process may use, shared with the machine's other ranks (as torchrun counts them)."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _arrays(*tensors: Tensor) -> Arrays:
    return tuple(np.ascontiguousarray(tensor.numpy()) for tensor in tensors)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def _rounded(floats: int) -> int:
    return -(-floats // _LANES) * _LANES


def _divided(sizes: dict[str, int]) -> Arrays:
    """This thread's scratch, divided into float32 arrays of at least these sizes, in whole vectors."""
    ends = np.cumsum([_rounded(size) for size in sizes.values()])
    scratch = _scratch(int(ends[-1]))
    return tuple(np.split(scratch[: ends[-1]], ends[:-1]))


def _scratch(floats: int) -> np.ndarray:
    """This thread's float32 scratch, kept from call to call and made larger when needed."""
    if getattr(_thread, "scratch", np.empty(0)).size < floats:
        unaligned = np.empty(floats + _LINE // 4, dtype=np.float32)
        _thread.scratch = unaligned[-unaligned.ctypes.data % _LINE // 4 :]
    return _thread.scratch


# ---- what numba has no words for: operations on whole vectors, written in LLVM's. They are in this file because numba
# looks at no other file when it decides whether the code in its cache is still this one.

_VECTOR = ir.VectorType(ir.FloatType(), _LANES)


def _load(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, lanes: int = _LANES) -> Any:
    """The vector that starts at an array's element, or with lanes=1 the element."""
    address = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    if lanes == 1:
        return builder.load(address)
    return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)


def _store(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, vector: Any) -> None:
    address = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=array_type.dtype.bitwidth // 8)


def _everywhere(builder: ir.IRBuilder, value: Any) -> Any:
    """A vector that holds one value in every lane."""
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES))


def _turned(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The transpose of 16 vectors: a perfect shuffle of all their values, as of cards, done four times."""
    masks = [
        ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [i // 2 + i % 2 * _LANES + half for i in range(_LANES)])
        for half in (0, _LANES // 2)
    ]
    for _ in range(_LANES.bit_length() - 1):
        pairs = zip(rows[: _LANES // 2], rows[_LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return rows


def _rounded_to(dtype: Any, builder: ir.IRBuilder, vector: Any) -> Any:
    """Float32s as an array stores them: as they are, or the bits of float16 (for int16) or bfloat16 (for uint16)."""
    if dtype == types.float32:
        return vector
    words = ir.VectorType(ir.IntType(16), _LANES)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), _LANES)), words)
    bits = builder.bitcast(vector, ir.VectorType(ir.IntType(32), _LANES))
    one, half, most = (ir.Constant(bits.type, [number] * _LANES) for number in (1, 16, 0x7FFF))
    odd = builder.and_(builder.lshr(bits, half), one)  # a tie goes to the even neighbour
    return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, most)), half), words)


@intrinsic
def _turn(_: Any, source: Any, at: Any, pitch: Any, out: Any, to: Any) -> Any:
    """out[to + 16 x + y] = source[at + pitch y + x], for x, y < 16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (source_type, _, _, out_type, _), (source, at, pitch, out, to) = signature.args, arguments
        numbers = [ir.Constant(at.type, y) for y in range(_LANES)]
        starts = [builder.add(at, builder.mul(pitch, y)) for y in numbers]
        turned = _turned(builder, [_load(context, builder, source_type, source, start) for start in starts])
        for x, vector in enumerate(turned):
            _store(context, builder, out_type, out, builder.add(to, ir.Constant(to.type, _LANES * x)), vector)
        return context.get_dummy_value()

    return types.void(source, at, pitch, out, to), generate


@intrinsic
def _turn_back(
    _: Any, source: Any, rows: Any, first: Any, at: Any, mean: Any, inverse_std: Any, out: Any, to: Any, pitch: Any
) -> Any:
    """out[to + pitch y + k] = (source[rows[first + k] + at + y] − mean[first + k]) · inverse_std[first + k], k, y < 16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, rows, first, at, mean, inverse_std, out, to, pitch = arguments
        source_type, rows_type, _, _, scale_type, _, out_type, _, _ = signature.args
        numbers = [ir.Constant(at.type, k) for k in range(_LANES)]
        starts = [_load(context, builder, rows_type, rows, builder.add(first, k), 1) for k in numbers]
        columns = [_load(context, builder, source_type, source, builder.add(start, at)) for start in starts]
        mean, inverse_std = (_load(context, builder, scale_type, scale, first) for scale in (mean, inverse_std))
        for y, vector in zip(numbers, _turned(builder, columns), strict=True):
            normal = builder.fmul(builder.fsub(vector, mean), inverse_std)
            stored = _rounded_to(out_type.dtype, builder, normal)
            _store(context, builder, out_type, out, builder.add(to, builder.mul(pitch, y)), stored)
        return context.get_dummy_value()

    return types.void(source, rows, first, at, mean, inverse_std, out, to, pitch), generate


@intrinsic
def _sum_taps(
    _: Any, source: Any, at: Any, weights: Any, first: Any, count: Any, out: Any, to: Any, plane: Any
) -> Any:
    """out[to + plane c + y] = sum over t < count of weights[first + t] · source[at + 48 t + 16 c + y], c < 3, y < 16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, at, weights, first, count, out, to, plane = arguments
        source_type, _, weights_type, _, _, out_type, _, _ = signature.args
        zero, planes = ir.Constant(_VECTOR, [0.0] * _LANES), [ir.Constant(at.type, c) for c in range(3)]
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in planes]  # in registers, once LLVM is done
        for total in sums:
            builder.store(zero, total)
        with cgutils.for_range(builder, count, intp=at.type) as loop:
            weight = _load(context, builder, weights_type, weights, builder.add(first, loop.index), 1)
            weight = _everywhere(builder, weight)
            pixel = builder.add(at, builder.mul(loop.index, ir.Constant(at.type, 3 * _LANES)))
            for c, total in enumerate(sums):
                place = builder.add(pixel, ir.Constant(at.type, c * _LANES))
                product = builder.fmul(_load(context, builder, source_type, source, place), weight, flags=["contract"])
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for c, total in zip(planes, sums, strict=True):
            place = builder.add(to, builder.mul(plane, c))
            _store(context, builder, out_type, out, place, builder.load(total))
        return context.get_dummy_value()

    return types.void(source, at, weights, first, count, out, to, plane), generate


def _sum_pairs_of(vectors: int) -> Any:
    """An operation on some vectors at once, which shares the work on each tap among them."""

    @intrinsic
    def sum_pairs(_: Any, source: Any, starts: Any, kernel: Any, radius: Any, at: Any, out: Any, to: Any) -> Any:
        """out[to + y] = sum over |t| <= radius of kernel[|t|] · source[starts[radius + t] + at + y], y < 16 vectors."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            source, starts, kernel, radius, at, out, to = arguments
            source_type, starts_type, kernel_type, _, _, out_type, _ = signature.args
            offsets = [ir.Constant(at.type, n * _LANES) for n in range(vectors)]

            def tap(number: Any) -> list[Any]:
                start = builder.add(_load(context, builder, starts_type, starts, number, 1), at)
                return [_load(context, builder, source_type, source, builder.add(start, n)) for n in offsets]

            def weight(distance: Any) -> Any:
                return _everywhere(builder, _load(context, builder, kernel_type, kernel, distance, 1))

            totals = [cgutils.alloca_once(builder, _VECTOR) for _ in offsets]  # in registers, once LLVM is done
            middle = weight(ir.Constant(at.type, 0))
            for total, value in zip(totals, tap(radius), strict=True):
                builder.store(builder.fmul(value, middle), total)
            with cgutils.for_range(builder, radius, intp=at.type) as loop:
                distance = builder.add(loop.index, ir.Constant(at.type, 1))
                factor = weight(distance)
                right, left = tap(builder.add(radius, distance)), tap(builder.sub(radius, distance))
                for total, a, b in zip(totals, right, left, strict=True):
                    product = builder.fmul(builder.fadd(a, b), factor, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
            for total, n in zip(totals, offsets, strict=True):
                _store(context, builder, out_type, out, builder.add(to, n), builder.load(total))
            return context.get_dummy_value()

        return types.void(source, starts, kernel, radius, at, out, to), generate

    return sum_pairs


_sum_pairs, _sum_pairs_4 = _sum_pairs_of(1), _sum_pairs_of(4)


# ---- the views


@_compiled
def _make_views(
    first: int, last: int, source: Arrays, table: Arrays, scale: Arrays, most: tuple[int, int, int], scratch: Arrays,
    out_VBX: Array,
) -> None:  # fmt: skip
    """Makes the views numbered first…last-1, image by image.

    most: the side of a view, and the batch's most taps of a resize and largest radius of a blur.
    """
    pixels, offset_B, width_B = source
    crop_BV4, flip_BV, order_BV4, strength_BV4, gray_BV, sigma_BV, solarize_BV = table
    size, taps, radius = most
    view, other, weights, strip, band, padded, kernel = scratch
    pitch = -(-size // _LANES) * _LANES
    plane, views = size * pitch, flip_BV.shape[1]
    weights = weights[: 2 * size * taps].reshape(2, size, taps)
    spans = np.empty((2, 2, size), dtype=np.int64)
    starts = np.empty(2 * radius + 1, dtype=np.uint64)
    rows = np.empty(3 * max(size, _LANES), dtype=np.uint64)
    for item in range(first, last):
        b, v = item // views, item % views
        stride = 3 * width_B[b]
        at = offset_B[b] + crop_BV4[b, v, 0] * stride + 3 * crop_BV4[b, v, 1]
        height, width = crop_BV4[b, v, 2], crop_BV4[b, v, 3]
        _resize(pixels, at, stride, height, width, flip_BV[b, v], weights, spans, strip, band, pitch, view)
        _recolour(order_BV4[b, v], strength_BV4[b, v], gray_BV[b, v], size, pitch, view)
        planes = 1 if gray_BV[b, v] else 3  # of a gray view, one stands for all three
        if sigma_BV[b, v] > 0:
            for c in range(planes):
                of = slice(c * plane, (c + 1) * plane)
                _blur(view[of], sigma_BV[b, v], size, pitch, kernel, padded, starts, other[of])
            view, other = other, view
        if solarize_BV[b, v]:
            _solarize(view[: planes * plane])
        _write(view, planes, size, pitch, rows, scale, out_VBX[v, b])


@_compiled
def _triangle(length: int, size: int, whole: float, weight: Array, span: Array) -> None:
    """Weights and source span of each output of an antialiased linear resize, as torch and Pillow define it.

    whole: what the weights of an output sum to. Those beyond its span are zero.
    """
    scale = length / size
    support = max(scale, 1.0)
    for i in range(size):
        centre = scale * (i + 0.5)
        start = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), length) - start
        total = 0.0
        for t in range(count):
            weight[i, t] = max(1.0 - abs((start + t + 0.5 - centre) / support), 0.0)
            total += weight[i, t]
        for t in range(count):
            weight[i, t] *= whole / total
        weight[i, count:] = 0
        span[0, i], span[1, i] = start, count


@_compiled
def _resize(
    pixels: Array, at: int, stride: int, height: int, width: int, flip: bool, weights: Array, spans: Array,
    strip: Array, band: Array, pitch: int, view: Array,
) -> None:  # fmt: skip
    """Resizes the crop that starts at pixels[at] into the planes of view, in 0…1, column after column.

    A band of rows at a time: first across rows, which reads bytes in order; then, turned, along the rows, where the same
    pixel of all rows of the band is one vector (measured: a quarter of the time of pixel after pixel).
    Offsets are unsigned here and in the blur: numba checks a signed index for wrapping, which hinders vectorising, and
    slices instead would count references, which costs more than the arithmetic of a row.
    """
    size = spans.shape[2]
    most = weights.shape[2]
    plane = np.uint64(size * pitch)
    flat = weights.reshape(2 * size * most)
    _triangle(height, size, 1 / 255, weights[0], spans[0])
    _triangle(width, size, 1.0, weights[1], spans[1])
    for top in range(0, size, _LANES):
        for left in range(0, 3 * width, _TILE):
            length = min(3 * width - left, _TILE)
            for y in range(top, top + _LANES):
                to = np.uint64((y - top) * _TILE)
                if y < size:
                    start, taps = at + spans[0, 0, y] * stride + left, spans[0, 1, y]
                    _mix_rows(pixels, start, stride, weights, taps, y, np.uint64(length), strip, to)
                else:
                    strip[to : to + np.uint64(_TILE)] = 0
            for x in range(0, length, _LANES):
                _turn(strip, np.uint64(x), np.uint64(_TILE), band, np.uint64((left + x) * _LANES))
        for i in range(size):
            x = size - 1 - i if flip else i
            _sum_taps(
                band, np.uint64(3 * _LANES * spans[1, 0, i]), flat, np.uint64((size + i) * most),
                np.uint64(spans[1, 1, i]), view, np.uint64(x * pitch + top), plane,
            )  # fmt: skip


@_compiled
def _mix_rows(
    pixels: Array, at: int, stride: int, weights: Array, taps: int, y: int, count: np.uint64, strip: Array, to: np.uint64
) -> None:
    """strip[to + x] = the sum of the source rows from pixels[at] on, each times its weight for output row y, x < count.

    Four taps at once, or two where there are no more: fewer loads and stores of sums. Weights beyond the taps are zero.
    """
    last = at + (taps - 1) * stride
    for t in range(0, taps, 4):
        a = np.uint64(at + t * stride)
        b = np.uint64(min(at + (t + 1) * stride, last))
        c = np.uint64(min(at + (t + 2) * stride, last))
        d = np.uint64(min(at + (t + 3) * stride, last))
        u, v, w, z = weights[0, y, t], weights[0, y, t + 1], weights[0, y, t + 2], weights[0, y, t + 3]
        if taps <= 2:
            for x in range(count):
                strip[to + x] = u * np.float32(pixels[a + x]) + v * np.float32(pixels[b + x])
        elif t == 0:
            for x in range(count):
                strip[to + x] = (
                    u * np.float32(pixels[a + x]) + v * np.float32(pixels[b + x]) + w * np.float32(pixels[c + x])
                    + z * np.float32(pixels[d + x])
                )  # fmt: skip
        else:
            for x in range(count):
                strip[to + x] += (
                    u * np.float32(pixels[a + x]) + v * np.float32(pixels[b + x]) + w * np.float32(pixels[c + x])
                    + z * np.float32(pixels[d + x])
                )  # fmt: skip


@_compiled
def _recolour(order: Array, strength: Array, gray: bool, size: int, pitch: int, view: Array) -> None:
    """The colour operations in their order, in place; then, where asked for, the gray of the planes in the first.

    A few columns at a time go through all operations up to the next change of contrast, which needs the mean of all.
    """
    plane, columns = size * pitch, max(1, _BLOCK // pitch)
    begin, end, level = 0, _next_contrast(order, 0), _ZERO
    while True:
        total = _ZERO
        for x in range(0, size, columns):
            first, last = x * pitch, min(x + columns, size) * pitch
            red, green = view[first:last], view[plane + first : plane + last]
            blue = view[2 * plane + first : 2 * plane + last]
            for k in range(begin, end):
                _change(order[k], strength, level, red, green, blue)
            if end < 4:
                total += _sum_gray(red, green, blue, size, pitch)
            elif gray:
                _gray(red, green, blue)
        if end == 4:
            return
        begin, end, level = end, _next_contrast(order, end + 1), total / np.float32(size * size)


@_compiled
def _next_contrast(order: Array, k: int) -> int:
    while k < 4 and order[k] != 1:
        k += 1
    return k


@_compiled
def _change(operation: int, strength: Array, level: np.float32, red: Array, green: Array, blue: Array) -> None:
    if operation == 0:
        _blend(red, green, blue, strength[0], _ZERO)
    elif operation == 1:
        _blend(red, green, blue, strength[1], level)
    elif operation == 2:
        _saturate(red, green, blue, strength[2])
    elif operation == 3:
        _turn_hue(red, green, blue, strength[3])


@_compiled
def _unit(x: np.float32) -> np.float32:
    x = x if x > _ZERO else _ZERO
    return x if x < _ONE else _ONE


@_compiled
def _blend(red: Array, green: Array, blue: Array, factor: np.float32, level: np.float32) -> None:
    """Away from or towards one level: black for brightness, the mean gray for contrast."""
    rest = (_ONE - factor) * level
    for i in range(red.size):
        red[i] = _unit(factor * red[i] + rest)
        green[i] = _unit(factor * green[i] + rest)
        blue[i] = _unit(factor * blue[i] + rest)


@_compiled
def _sum_gray(red: Array, green: Array, blue: Array, size: int, pitch: int) -> np.float32:
    """Of whole columns, of which the first `size` values count."""
    r = g = b = _ZERO
    for x in range(0, red.size, pitch):
        for y in range(np.uint64(x), np.uint64(x + size)):
            r += red[y]
            g += green[y]
            b += blue[y]
    return _RED * r + _GREEN * g + _BLUE * b


@_compiled
def _saturate(red: Array, green: Array, blue: Array, factor: np.float32) -> None:
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        rest = (_ONE - factor) * (_RED * r + _GREEN * g + _BLUE * b)
        red[i], green[i], blue[i] = _unit(factor * r + rest), _unit(factor * g + rest), _unit(factor * b + rest)


@_compiled
def _turn_hue(red: Array, green: Array, blue: Array, turn: np.float32) -> None:
    """Turns the hue of HSV colours. Hues here count six to the circle; gray pixels have none and stay as they are."""
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        high = max(r, g, b)
        chroma = high - min(r, g, b)
        inverse = _ONE / (chroma if chroma > _ZERO else _ONE)
        hue = (g - b) * inverse if high == r else ((b - r) * inverse + _TWO if high == g else (r - g) * inverse + _FOUR)
        hue += _SIX * turn
        red[i] = high - chroma * _shade(hue + np.float32(5))
        green[i] = high - chroma * _shade(hue + np.float32(3))
        blue[i] = high - chroma * _shade(hue + _ONE)


@_compiled
def _shade(k: np.float32) -> np.float32:
    """How far a channel lies below the highest one, in units of the chroma.

    That is max(0, min(k, 4 - k, 1)), with k modulo 6 the hue's distance from the channel's own place on the circle (the
    branch-free form of HSV to RGB).
    """
    k = k - _SIX * np.floor(k / _SIX)
    return _unit(min(k, _FOUR - k))


@_compiled
def _gray(red: Array, green: Array, blue: Array) -> None:
    """The gray of the three planes, in the first."""
    for i in range(red.size):
        red[i] = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]


@_compiled
def _blur(
    plane: Array, sigma: float, size: int, pitch: int, kernel: Array, padded: Array, starts: Array, blurred: Array
) -> None:
    """Separable Gaussian blur of one plane with reflected edges, column by column: across the columns, then along each.

    starts (2 radius + 1): where the column of each tap starts. padded: a column with margins of whole vectors.
    """
    radius = int(np.ceil(3.0 * sigma))
    margin = -(-radius // _LANES) * _LANES
    _gaussian(sigma, radius, kernel)
    for x in range(size):
        for t in range(-radius, radius + 1):
            starts[radius + t] = (size - 1 - abs(size - 1 - abs(x + t))) * pitch
        _convolve(plane, starts, kernel, radius, pitch, padded, margin)
        for t in range(1, radius + 1):
            padded[margin - t] = padded[margin + t]
            padded[margin + size - 1 + t] = padded[margin + size - 1 - t]
        for t in range(-radius, radius + 1):
            starts[radius + t] = margin + t
        _convolve(padded, starts, kernel, radius, pitch, blurred, x * pitch)


@_compiled
def _convolve(source: Array, starts: Array, kernel: Array, radius: int, pitch: int, out: Array, to: int) -> None:
    """One column of a blur: out[to + y] for y < pitch, from the columns of source at `starts`."""
    taps, fours = np.uint64(radius), pitch // (4 * _LANES) * (4 * _LANES)
    for y in range(0, fours, 4 * _LANES):
        _sum_pairs_4(source, starts, kernel, taps, np.uint64(y), out, np.uint64(to + y))
    for y in range(fours, pitch, _LANES):
        _sum_pairs(source, starts, kernel, taps, np.uint64(y), out, np.uint64(to + y))


@_compiled
def _gaussian(sigma: float, radius: int, kernel: Array) -> None:
    """The middle and one side of a Gaussian kernel that sums to one."""
    total = 0.0
    for t in range(radius + 1):
        kernel[t] = math.exp(-0.5 * (t / sigma) ** 2)
        total += kernel[t] * (2.0 if t else 1.0)
    for t in range(radius + 1):
        kernel[t] /= total


@_compiled
def _solarize(values: Array) -> None:
    for i in range(values.size):
        values[i] = values[i] if values[i] < _HALF else _ONE - values[i]


@_compiled
def _write(view: Array, planes: int, size: int, pitch: int, rows: Array, scale: Arrays, out: Array) -> None:
    """Turns the planes back, interleaves and normalises them, and writes them to out.

    rows: where each column of each colour starts, in the order of out. scale: of each value of a row.
    """
    mean, inverse_std = scale
    side = max(size, _LANES)  # a smaller view than a block of vectors goes through one
    length = 3 * side
    whole = out if size >= _LANES else np.empty(length * side, out.dtype)
    for k in range(length):
        rows[k] = min(k // 3, size - 1) * pitch + (k % 3 * size * pitch if planes == 3 else 0)
    for block_y in range(0, side, _LANES):
        y = min(block_y, side - _LANES)  # the last blocks overlap others where the size is no multiple of theirs
        for block_k in range(0, length, _LANES):
            k = np.uint64(min(block_k, length - _LANES))
            to = np.uint64(y * length) + k
            _turn_back(view, rows, k, np.uint64(y), mean, inverse_std, whole, to, np.uint64(length))
    if size < _LANES:
        for y in range(size):
            out[3 * size * y : 3 * size * (y + 1)] = whole[length * y : length * y + 3 * size]
