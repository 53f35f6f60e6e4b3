"""The compiled part of the augmentation on CPU cores: views from images, one after the other, on one thread.

A view is made in three float32 planes, because whole-plane loops vectorise. The planes are stored turned (column after
column): the resize works on bands of 16 rows, and the 16 values that lie below each other in a column are one vector.
Writing turns the view back, interleaves and normalises it.

All of it is in one file, because numba looks at no other when it decides whether code in its cache is still current.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from llvmlite.ir import Value
    from numba.core.base import BaseContext
    from numba.core.types import Type
    from numba.core.typing import Context
    from numba.core.typing.templates import Signature

    Emitter = tuple[Signature, Callable]

Array = np.ndarray
Arrays = tuple[np.ndarray, ...]

# Sums may be reordered and fused, which is what lets LLVM vectorise them; nothing assumes away NaN or infinity.
# The numpy error model leaves out the check of every division, which would keep loops from being vectorised.
_CACHE = os.environ.get("NUMBA_CACHE_DIR") != ""  # empty: no folder can be written
_compiled = numba.njit(nogil=True, cache=_CACHE, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")

_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
_RED, _GREEN, _BLUE = (np.float32(x) for x in (0.2989, 0.587, 0.114))  # torchvision's weights of rgb_to_grayscale
LANES = 16  # rows of a band, values of a vector: one register of AVX-512, a few of others
TILE = 512  # columns of a band that are mixed and turned at once, so that they stay in the first-level cache
LINE = 64  # bytes of a cache line, to which vectors are aligned
_BLOCK = 2048  # about as many pixels go through all colour operations together, for the same reason


# ---- what numba has no words for: operations on whole vectors, in the words of LLVM

_operation: Callable[[Callable], Callable] = intrinsic
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _load(
    context: BaseContext, builder: ir.IRBuilder, array_type: types.Array, array: Value, index: Value, lanes: int = LANES
) -> Value:
    """The vector that starts at an array's element, or with lanes=1 the element."""
    address = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    if lanes == 1:
        return builder.load(address)
    return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)


def _store(
    context: BaseContext,
    builder: ir.IRBuilder,
    array_type: types.Array,
    array: Value,
    index: Value,
    vector: Value,
    streamed: bool = False,
) -> None:
    """streamed: to memory past the caches, which needs an address that is a multiple of the vector's size."""
    address = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    size = np.dtype(str(array_type.dtype)).itemsize
    store = builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), size * (LANES if streamed else 1))
    if streamed:
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _everywhere(builder: ir.IRBuilder, value: Value) -> Value:
    """A vector that holds one value in every lane."""
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _turned(builder: ir.IRBuilder, rows: list[Value]) -> list[Value]:
    """The transpose of 16 vectors: a perfect shuffle of all their values, as of cards, done four times."""
    masks = [
        ir.Constant(ir.VectorType(ir.IntType(32), LANES), [i // 2 + i % 2 * LANES + half for i in range(LANES)])
        for half in (0, LANES // 2)
    ]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return rows


def _rounded_to(dtype: Type, builder: ir.IRBuilder, vector: Value) -> Value:
    """Float32s as an array stores them: as they are, or the bits of float16 (for int16) or bfloat16 (for uint16)."""
    if dtype == types.float32:
        return vector
    words = ir.VectorType(ir.IntType(16), LANES)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES)), words)
    bits = builder.bitcast(vector, ir.VectorType(ir.IntType(32), LANES))
    one, half, most = (ir.Constant(bits.type, [number] * LANES) for number in (1, 16, 0x7FFF))
    odd = builder.and_(builder.lshr(bits, half), one)  # a tie goes to the even neighbour
    return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, most)), half), words)


@_operation
def _turn(_: Context, source: Type, at: Type, pitch: Type, out: Type, to: Type) -> Emitter:
    """out[to + 16 x + y] = source[at + pitch y + x], for x, y < 16."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]) -> Value:
        (source_type, _, _, out_type, _), (source, at, pitch, out, to) = signature.args, arguments
        numbers = [ir.Constant(at.type, y) for y in range(LANES)]
        starts = [builder.add(at, builder.mul(pitch, y)) for y in numbers]
        turned = _turned(builder, [_load(context, builder, source_type, source, start) for start in starts])
        for x, vector in enumerate(turned):
            _store(context, builder, out_type, out, builder.add(to, ir.Constant(to.type, LANES * x)), vector)
        return context.get_dummy_value()

    return types.void(source, at, pitch, out, to), generate


def _turn_back_of(streamed: bool) -> Callable:
    @_operation
    def turn_back(
        _: Context,
        source: Type,
        rows: Type,
        first: Type,
        at: Type,
        mean: Type,
        inverse_std: Type,
        out: Type,
        to: Type,
        pitch: Type,
    ) -> Emitter:
        """out[to + pitch y + k] = (source[rows[first + k] + at + y] − mean[first + k]) · inverse_std[first + k],

        for k, y < 16.
        """

        def generate(
            context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]
        ) -> Value:
            source, rows, first, at, mean, inverse_std, out, to, pitch = arguments
            source_type, rows_type, _, _, scale_type, _, out_type, _, _ = signature.args
            numbers = [ir.Constant(at.type, k) for k in range(LANES)]
            starts = [_load(context, builder, rows_type, rows, builder.add(first, k), 1) for k in numbers]
            columns = [_load(context, builder, source_type, source, builder.add(start, at)) for start in starts]
            mean, inverse_std = (_load(context, builder, scale_type, scale, first) for scale in (mean, inverse_std))
            for y, vector in zip(numbers, _turned(builder, columns), strict=True):
                normal = builder.fmul(builder.fsub(vector, mean), inverse_std)
                place = builder.add(to, builder.mul(pitch, y))
                stored = _rounded_to(out_type.dtype, builder, normal)
                _store(context, builder, out_type, out, place, stored, streamed)
            return context.get_dummy_value()

        return types.void(source, rows, first, at, mean, inverse_std, out, to, pitch), generate

    return turn_back


_turn_back, _turn_back_streamed = _turn_back_of(False), _turn_back_of(True)


@_operation
def _sum_taps(
    _: Context, source: Type, at: Type, weights: Type, first: Type, count: Type, out: Type, to: Type, plane: Type
) -> Emitter:
    """out[to + plane c + y] = sum over t < count of weights[first + t] · source[at + 48 t + 16 c + y].

    For c < 3, y < 16: one pixel of 16 rows, as the sum of pixels of a band, into three planes.
    """

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]) -> Value:
        source, at, weights, first, count, out, to, plane = arguments
        source_type, _, weights_type, _, _, out_type, _, _ = signature.args
        zero, planes = ir.Constant(_VECTOR, [0.0] * LANES), [ir.Constant(at.type, c) for c in range(3)]
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in planes]  # in registers, once LLVM is done
        for total in sums:
            builder.store(zero, total)
        with cgutils.for_range(builder, count, intp=at.type) as loop:
            weight = _load(context, builder, weights_type, weights, builder.add(first, loop.index), 1)
            weight = _everywhere(builder, weight)
            pixel = builder.add(at, builder.mul(loop.index, ir.Constant(at.type, 3 * LANES)))
            for c, total in enumerate(sums):
                place = builder.add(pixel, ir.Constant(at.type, c * LANES))
                product = builder.fmul(_load(context, builder, source_type, source, place), weight, flags=["contract"])
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for c, total in zip(planes, sums, strict=True):
            place = builder.add(to, builder.mul(plane, c))
            _store(context, builder, out_type, out, place, builder.load(total))
        return context.get_dummy_value()

    return types.void(source, at, weights, first, count, out, to, plane), generate


def _sum_pairs_of(vectors: int) -> Callable:
    """An operation on some vectors at once, which shares the work on each tap among them."""

    @_operation
    def sum_pairs(
        _: Context, source: Type, starts: Type, kernel: Type, radius: Type, at: Type, out: Type, to: Type
    ) -> Emitter:
        """out[to + y] = sum over |t| ≤ radius of kernel[|t|] · source[starts[radius + t] + at + y], for all y."""

        def generate(
            context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]
        ) -> Value:
            source, starts, kernel, radius, at, out, to = arguments
            source_type, starts_type, kernel_type, _, _, out_type, _ = signature.args
            offsets = [ir.Constant(at.type, n * LANES) for n in range(vectors)]

            def tap(number: Value) -> list[Value]:
                start = builder.add(_load(context, builder, starts_type, starts, number, 1), at)
                return [_load(context, builder, source_type, source, builder.add(start, n)) for n in offsets]

            def weight(distance: Value) -> Value:
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


@_operation
def _pointer(_: Context, address: Type) -> Emitter:
    """An address as a pointer that numba.carray makes an array of."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]) -> Value:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@_operation
def _prefetch(_: Context, array: Type, index: Type) -> Emitter:
    """Asks for the cache line of an array's element, without waiting for it."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]) -> Value:
        array, index = arguments
        address = builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [index])
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(prefetch, [address, word(0), word(2), word(1)])  # data, to be read, into the second-level cache
        return context.get_dummy_value()

    return types.void(array, index), generate


# ---- the views


@_compiled
def make_views(
    first: int, last: int, source: Arrays, table: Arrays, scale: Arrays, most: tuple[int, int, int], scratch: Arrays,
    size_V: Array, address_V: Array, like: Array,
) -> None:  # fmt: skip
    """Makes the views numbered first…last-1, image by image: an image's bytes are read once for views of all sizes.

    most: the batch's largest side of a view, most taps of a resize and largest radius of a blur. address_V: where the
    views numbered V of all images lie, one after the other. like: an array of the outputs' type.
    """
    pixels, offset_B, width_B = source
    crop_BV4, flip_BV, order_BV4, strength_BV4, gray_BV, sigma_BV, solarize_BV = table
    side, taps, radius = most
    view, weights_X, strip, band, padded, kernel = scratch
    views = flip_BV.shape[1]
    spans = np.empty((2, 2, side), dtype=np.int64)
    at_C = np.empty(3, dtype=np.int64)  # where the plane of each colour starts
    starts = np.empty(2 * radius + 1, dtype=np.uint64)
    rows = np.empty(3 * max(side, LANES), dtype=np.uint64)
    for item in range(first, last):
        b, v = item // views, item % views
        size = size_V[v]
        pitch = -(-size // LANES) * LANES
        plane, values = size * pitch, 3 * size * size
        weights = weights_X[: 2 * size * taps].reshape(2, size, taps)
        crop = _crop(item, offset_B, width_B, crop_BV4)
        ahead = _crop(min(item + 1, last - 1), offset_B, width_B, crop_BV4)
        _resize(pixels, crop, ahead, flip_BV[b, v], weights, spans, strip, band, pitch, view)
        _recolour(order_BV4[b, v], strength_BV4[b, v], gray_BV[b, v], size, pitch, view)
        colours = 1 if gray_BV[b, v] else 3  # one plane stands for all of a gray view
        spare = 3 * plane
        for c in range(colours):
            at_C[c] = c * plane
            if sigma_BV[b, v] > 0:
                unblurred, blurred = view[at_C[c] : at_C[c] + plane], view[spare : spare + plane]
                _blur(unblurred, sigma_BV[b, v], size, pitch, kernel, padded, starts, blurred)
                at_C[c], spare = spare, at_C[c]
            if solarize_BV[b, v]:
                _solarize(view[at_C[c] : at_C[c] + plane])
        at_C[colours:] = at_C[0]
        address = address_V[v] + b * values * like.itemsize
        streamed = size % LANES == 0 and address % LINE == 0
        out = numba.carray(_pointer(address), values, like.dtype)
        _write(view, at_C, size, pitch, rows, scale, streamed, out)


@_compiled
def _crop(item: int, offset_B: Array, width_B: Array, crop_BV4: Array) -> tuple[int, int, int, int]:
    """Where the crop of a numbered view starts in pixels, the bytes of an image's row, and the crop's two sides."""
    b, v = item // crop_BV4.shape[1], item % crop_BV4.shape[1]
    stride = 3 * width_B[b]
    top, left, height, width = crop_BV4[b, v]
    return offset_B[b] + top * stride + 3 * left, stride, height, width


@_compiled
def _read_ahead(pixels: Array, crop: tuple[int, int, int, int], part: int, parts: int) -> None:
    """Asks for one of some equal parts of the next crop, which comes from memory while this view is made."""
    at, stride, height, width = crop
    for y in range(height * part // parts, height * (part + 1) // parts):
        for x in range(np.uint64(0), np.uint64(3 * width), np.uint64(LINE)):
            _prefetch(pixels, np.uint64(at + y * stride) + x)


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
    pixels: Array, crop: tuple[int, int, int, int], ahead: tuple[int, int, int, int], flip: bool, weights: Array,
    spans: Array, strip: Array, band: Array, pitch: int, view: Array,
) -> None:  # fmt: skip
    """Resizes a crop into the planes of view, in 0…1, column after column; ahead: the crop to be resized next.

    A band of rows at a time: first across rows, which reads bytes in order; then, turned, along the rows, where the
    same pixel of all rows of the band is one vector (measured: a quarter of the time of pixel after pixel).
    Offsets are unsigned here and in the blur: numba checks a signed index for wrapping, which hinders vectorising, and
    slices instead would count references, which costs more than the arithmetic of a row.
    """
    at, stride, height, width = crop
    size, most = weights.shape[1:]
    plane = np.uint64(size * pitch)
    flat = weights.reshape(2 * size * most)
    _triangle(height, size, 1 / 255, weights[0], spans[0])
    _triangle(width, size, 1.0, weights[1], spans[1])
    for top in range(0, size, LANES):
        for left in range(0, 3 * width, TILE):
            length = min(3 * width - left, TILE)
            for y in range(top, top + LANES):
                if left == 0:
                    _read_ahead(pixels, ahead, y, pitch)
                to = np.uint64((y - top) * TILE)
                if y < size:
                    start, taps = at + spans[0, 0, y] * stride + left, spans[0, 1, y]
                    _mix_rows(pixels, start, stride, weights, taps, y, np.uint64(length), strip, to)
                else:
                    strip[to : to + np.uint64(TILE)] = 0
            for x in range(0, length, LANES):
                _turn(strip, np.uint64(x), np.uint64(TILE), band, np.uint64((left + x) * LANES))
        for i in range(size):
            x = size - 1 - i if flip else i
            _sum_taps(
                band, np.uint64(3 * LANES * spans[1, 0, i]), flat, np.uint64((size + i) * most),
                np.uint64(spans[1, 1, i]), view, np.uint64(x * pitch + top), plane,
            )  # fmt: skip


@_compiled
def _mix_rows(
    pixels: Array, at: int, stride: int, weights: Array, taps: int, y: int, count: np.uint64, strip: Array,
    to: np.uint64,
) -> None:  # fmt: skip
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
    """Turns the hue of HSV colours. Hues here count six to the circle; gray pixels have none and stay as they are.

    How far a channel lies below the highest one, in units of the chroma, is a trapezoid of the hue, centred on the
    channel's complement (red's on 3) or, seen the other way, on the channel itself (green's on 2, blue's on 4).
    """
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        high = max(r, g, b)
        chroma = high - min(r, g, b)
        inverse = _ONE / (chroma if chroma > _ZERO else _ONE)
        hue = (g - b) * inverse if high == r else ((b - r) * inverse + _TWO if high == g else (r - g) * inverse + _FOUR)
        hue += _SIX * turn
        hue -= _SIX * np.floor(hue / _SIX)
        red[i] = high - chroma * _unit(_TWO - abs(hue - _THREE))
        green[i] = high - chroma * _unit(abs(hue - _TWO) - _ONE)
        blue[i] = high - chroma * _unit(abs(hue - _FOUR) - _ONE)


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
    margin = -(-radius // LANES) * LANES
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
    taps, fours = np.uint64(radius), pitch // (4 * LANES) * (4 * LANES)
    for y in range(0, fours, 4 * LANES):
        _sum_pairs_4(source, starts, kernel, taps, np.uint64(y), out, np.uint64(to + y))
    for y in range(fours, pitch, LANES):
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
def _write(
    view: Array, at_C: Array, size: int, pitch: int, rows: Array, scale: Arrays, streamed: bool, out: Array
) -> None:
    """Turns the planes back, interleaves and normalises them, and writes them to out.

    rows: where each column of each colour starts, in the order of out. scale: of each value of a row.
    streamed: past the caches, which would first read what is overwritten, and which a batch of views does not fit in.
    """
    mean, inverse_std = scale
    side = max(size, LANES)  # a smaller view than a block of vectors goes through one
    length = 3 * side
    whole = out if size >= LANES else np.empty(length * side, out.dtype)
    for k in range(length):
        rows[k] = at_C[k % 3] + min(k // 3, size - 1) * pitch
    for block_y in range(0, side, LANES):
        y = min(block_y, side - LANES)  # the last blocks overlap others where the size is no multiple of theirs
        for block_k in range(0, length, LANES):
            first = np.uint64(min(block_k, length - LANES))
            to = np.uint64(y * length) + first
            if streamed:
                _turn_back_streamed(view, rows, first, np.uint64(y), mean, inverse_std, whole, to, np.uint64(length))
            else:
                _turn_back(view, rows, first, np.uint64(y), mean, inverse_std, whole, to, np.uint64(length))
    if size < LANES:
        for y in range(size):
            out[3 * size * y : 3 * size * (y + 1)] = whole[length * y : length * y + 3 * size]
