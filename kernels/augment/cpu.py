"""The augmentation compiled by numba for CPU cores: one pass over the source per view, then a cache-sized scratch.

A view is made in a planar float32 scratch (3, S·S), because whole-plane loops vectorise, and written interleaved and
normalised at the end. Work is shared out over this module's own threads (compiled code releases the interpreter lock),
so torch's and numba's thread settings are neither used nor changed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np
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
_CHUNKS_PER_THREAD = 4  # evens out images of different sizes; a chunk is one call into compiled code
_thread = threading.local()


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
    """Writes the normalised views into out_VBSS3. Arguments as for `kernels.augment.augment`, already checked."""
    views, images, size = out_VBSS3.shape[:3]
    longest = int(table.crop_BV4[..., 2:].max()) if images else 1
    taps = 2 * math.ceil(max(longest / size, 1.0)) + 1
    radius = math.ceil(3 * float(table.sigma_BV.max())) if images else 0
    floats = 6 * size * size + 2 * size * taps + 3 * longest + size + 3 * radius + 4
    source, scale = _arrays(pixels, offset_B, width_B), _arrays(mean, 1 / std)
    rows = _arrays(
        table.crop_BV4, table.flip_BV, table.order_BV4, table.strength_BV4, table.gray_BV, table.sigma_BV,
        table.solarize_BV,
    )  # fmt: skip
    out = out_VBSS3.numpy().reshape(views, images, size * size * 3)
    threads = _threads()
    bounds = np.linspace(0, images * views, min(images * views, threads * _CHUNKS_PER_THREAD) + 1).astype(np.int64)

    def run(chunk: tuple[int, int]) -> None:
        _make_views(*chunk, source, rows, scale, size, (taps, longest, radius), _scratch(floats), out)

    list(_pool(threads).map(run, zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))


def _threads() -> int:
    """The cores this process may use (each rank of a machine keeps to its own: fasttrain/dist.py)."""
    return len(os.sched_getaffinity(0))


def _arrays(*tensors: Tensor) -> Arrays:
    return tuple(np.ascontiguousarray(tensor.numpy()) for tensor in tensors)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def _scratch(floats: int) -> np.ndarray:
    """This thread's float32 scratch, kept from call to call and made larger when needed."""
    if getattr(_thread, "scratch", np.empty(0)).size < floats:
        _thread.scratch = np.empty(floats, dtype=np.float32)
    return _thread.scratch


@_compiled
def _make_views(
    first: int, last: int, source: Arrays, table: Arrays, scale: Arrays, size: int, most: tuple[int, int, int],
    scratch: Array, out_VBX: Array,
) -> None:  # fmt: skip
    """Makes the views numbered first…last-1, image by image, in a scratch that it divides up.

    most: the batch's most taps of a resize, longest side of a crop, and largest radius of a blur.
    """
    pixels, offset_B, width_B = source
    crop_BV4, flip_BV, order_BV4, strength_BV4, gray_BV, sigma_BV, solarize_BV = table
    taps, longest, radius = most
    area, views = size * size, flip_BV.shape[1]
    view, other, rest = scratch[: 3 * area], scratch[3 * area : 6 * area], scratch[6 * area :]
    weights = rest[: 2 * size * taps].reshape(2, size, taps)
    row = rest[2 * size * taps : 2 * size * taps + 3 * longest]
    blur = rest[2 * size * taps + 3 * longest :]
    spans = np.empty((2, 2, size), dtype=np.int64)
    starts = np.empty((2, radius + 4), dtype=np.uint64)
    for item in range(first, last):
        b, v = item // views, item % views
        stride = 3 * width_B[b]
        at = offset_B[b] + crop_BV4[b, v, 0] * stride + 3 * crop_BV4[b, v, 1]
        _resize(pixels, at, stride, crop_BV4[b, v, 2], crop_BV4[b, v, 3], flip_BV[b, v], weights, spans, row, view)
        _recolour(order_BV4[b, v], strength_BV4[b, v], view[:area], view[area : 2 * area], view[2 * area :])
        planes = 3
        if gray_BV[b, v]:  # from here on one plane stands for all three
            planes = 1
            _gray(view[:area], view[area : 2 * area], view[2 * area :])
        if sigma_BV[b, v] > 0:
            for c in range(planes):
                plane, blurred = view[c * area : (c + 1) * area], other[c * area : (c + 1) * area]
                _blur(plane, sigma_BV[b, v], size, blur, starts, blurred)
            view, other = other, view
        if solarize_BV[b, v]:
            _solarize(view[: planes * area])
        green, blue = (planes - 1) // 2 * area, (planes - 1) * area
        _write(view[:area], view[green : green + area], view[blue : blue + area], scale, out_VBX[v, b])


@_compiled
def _triangle(length: int, size: int, weight: Array, span: Array) -> None:
    """Weights and source span of each output of an antialiased linear resize, as torch and Pillow define it."""
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
            weight[i, t] /= total
        span[0, i], span[1, i] = start, count


@_compiled
def _resize(
    pixels: Array, at: int, stride: int, height: int, width: int, flip: bool, weights: Array, spans: Array, row: Array,
    view: Array,
) -> None:  # fmt: skip
    """Resizes the crop that starts at pixels[at] into the planes of view, in 0…1.

    Across rows first: that pass reads bytes in order and vectorises (measured: a tenth of the time); the pass along the
    row, which does not vectorise, then has only as many rows as the output.
    Offsets are unsigned here and in the blur: numba checks a signed index for wrapping, which hinders vectorising, and
    slices instead would count references, which costs more than the arithmetic of a row.
    """
    size = spans.shape[2]
    area = np.uint64(size * size)
    _triangle(height, size, weights[0], spans[0])
    _triangle(width, size, weights[1], spans[1])
    for y in range(size):
        top = at + spans[0, 0, y] * stride
        for t in range(spans[0, 1, y]):
            weight = weights[0, y, t] / np.float32(255)
            _add_row(pixels, np.uint64(top + t * stride), np.uint64(3 * width), weight, t == 0, row)
        for i in range(size):
            r = g = b = _ZERO
            k = np.uint64(3 * spans[1, 0, i])
            for t in range(spans[1, 1, i]):
                weight = weights[1, i, t]
                r += weight * row[k]
                g += weight * row[k + np.uint64(1)]
                b += weight * row[k + np.uint64(2)]
                k += np.uint64(3)
            x = np.uint64(y * size + (size - 1 - i if flip else i))
            view[x], view[x + area], view[x + area + area] = r, g, b


@_compiled
def _add_row(pixels: Array, at: np.uint64, count: np.uint64, weight: float, first: bool, row: Array) -> None:
    if first:
        for x in range(count):
            row[x] = weight * np.float32(pixels[at + x])
    else:
        for x in range(count):
            row[x] += weight * np.float32(pixels[at + x])


@_compiled
def _recolour(order: Array, strength: Array, red: Array, green: Array, blue: Array) -> None:
    """The colour operations in their order, in place."""
    for k in range(4):
        operation = order[k]
        if operation < 0:
            continue
        amount = strength[operation]
        if operation == 0:
            _blend(red, green, blue, amount, _ZERO)
        elif operation == 1:
            _blend(red, green, blue, amount, _mean_gray(red, green, blue))
        elif operation == 2:
            _saturate(red, green, blue, amount)
        else:
            _turn_hue(red, green, blue, amount)


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
def _mean_gray(red: Array, green: Array, blue: Array) -> np.float32:
    r = g = b = _ZERO
    for i in range(red.size):
        r += red[i]
        g += green[i]
        b += blue[i]
    return (_RED * r + _GREEN * g + _BLUE * b) / np.float32(red.size)


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
def _blur(plane: Array, sigma: float, size: int, scratch: Array, starts: Array, blurred: Array) -> None:
    """Separable Gaussian blur of one plane with reflected edges, row by row: across the rows, then along each.

    starts (2, radius + 4): where each tap's row starts, on either side of the middle.
    """
    radius = int(np.ceil(3.0 * sigma))
    kernel, padded = scratch[: radius + 4], scratch[radius + 4 :]
    _gaussian(sigma, radius, kernel)
    for y in range(size):
        for t in range(radius + 1):
            starts[0, t] = abs(y - t) * size
            starts[1, t] = (size - 1 - abs(size - 1 - y - t)) * size
        _convolve(plane, starts, kernel, radius, padded, np.uint64(radius), np.uint64(size))
        for t in range(1, radius + 1):
            padded[radius - t] = padded[radius + t]
            padded[radius + size - 1 + t] = padded[radius + size - 1 - t]
        for t in range(radius + 1):
            starts[0, t], starts[1, t] = radius - t, radius + t
        _convolve(padded, starts, kernel, radius, blurred, np.uint64(y * size), np.uint64(size))


@_compiled
def _gaussian(sigma: float, radius: int, kernel: Array) -> None:
    """The middle and one side of a Gaussian kernel that sums to one, then zeros."""
    total = 0.0
    kernel[:] = 0
    for t in range(radius + 1):
        kernel[t] = math.exp(-0.5 * (t / sigma) ** 2)
        total += kernel[t] * (2.0 if t else 1.0)
    for t in range(radius + 1):
        kernel[t] /= total


@_compiled
def _convolve(
    source: Array, starts: Array, kernel: Array, radius: int, out: Array, at: np.uint64, size: np.uint64
) -> None:
    """out[at + x] = the sum over the taps t on both sides of kernel[t] · source[starts[side, t] + x], for x < size.

    Three taps go at once, so that sums stay in registers: the kernel ends in zeros, and taps beyond it read the middle.
    """
    middle = starts[0, 0]
    for t in range(radius + 1, radius + 4):
        starts[0, t] = starts[1, t] = middle
    for x in range(size):
        out[at + x] = kernel[0] * source[middle + x]
    for t in range(1, radius + 1, 3):
        a, b, c = starts[0, t], starts[0, t + 1], starts[0, t + 2]
        d, e, f = starts[1, t], starts[1, t + 1], starts[1, t + 2]
        u, v, w = kernel[t], kernel[t + 1], kernel[t + 2]
        for x in range(size):
            out[at + x] += (
                u * (source[a + x] + source[d + x]) + v * (source[b + x] + source[e + x])
                + w * (source[c + x] + source[f + x])
            )  # fmt: skip


@_compiled
def _solarize(values: Array) -> None:
    for i in range(values.size):
        values[i] = values[i] if values[i] < _HALF else _ONE - values[i]


@_compiled
def _write(red: Array, green: Array, blue: Array, scale: Arrays, out: Array) -> None:
    """Normalises, and interleaves the planes into out."""
    mean, inverse_std = scale
    for i in range(red.size):
        out[3 * i] = (red[i] - mean[0]) * inverse_std[0]
        out[3 * i + 1] = (green[i] - mean[1]) * inverse_std[1]
        out[3 * i + 2] = (blue[i] - mean[2]) * inverse_std[2]
