# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow-untyped-defs = false
"""The Triton kernels of the augmentation; gpu.py says how they work together and lays out the table's rows.

Arguments: pixels, the images' bytes; rows (B · V, 16) int32; planes, blurred (B · V, 3, SIZE, SIZE), scratch; sums
(B · V, tiles) float32; out (V, B, SIZE, SIZE, 3); mean_3, scale_3 three floats each, scale = 1 / std. `row` points to a
view's row; y and x are the rows and columns of a tile. What Triton compiles has no Python types.
"""

import triton
import triton.language as tl

# Words of a row, and torchvision's weights of rgb_to_grayscale
_STRIDE, _HEIGHT, _WIDTH, _FLAGS, _RADIUS, _SIGMA = (tl.constexpr(i) for i in range(2, 8))
_ORDER, _STRENGTH, WORDS = tl.constexpr(8), tl.constexpr(12), tl.constexpr(16)
_FLIP, _GRAY, _SOLARIZE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
_NONE = tl.constexpr(4)  # the place of contrast in the order of a view without it


@triton.jit
def resize_kernel(
    pixels, rows, planes, sums, out, images, views, mean_3, scale_3, SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    view, y, x = _tile(SIZE, TILE, True)
    row = rows + view * WORDS
    red, green, blue = _crop(pixels, row, y, x, SIZE)
    contrast = _contrast_place(row)
    red, green, blue = _recolour(red, green, blue, row, 0, contrast)
    if contrast == _NONE:
        _hand_on(red, green, blue, row, planes, out, view, images, views, y, x, mean_3, scale_3, SIZE)
    else:
        inside = (y[:, None] < SIZE) & (x[None, :] < SIZE)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, _gray(red, green, blue), 0.0)))
        _store_planes(red, green, blue, planes, view, y, x, SIZE)


@triton.jit
def contrast_kernel(
    rows, planes, sums, SUMS: tl.constexpr, out, images, views, mean_3, scale_3, SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """SUMS: a power of two, at least the tiles of a view. Planes are overwritten in place, each pixel by its reader."""
    view, y, x = _tile(SIZE, TILE, False)
    row = rows + view * WORDS
    contrast = _contrast_place(row)
    if contrast != _NONE:
        TILES: tl.constexpr = ((SIZE + TILE - 1) // TILE) * ((SIZE + TILE - 1) // TILE)
        i = tl.arange(0, SUMS)
        level = tl.sum(tl.load(sums + view * TILES + i, mask=i < TILES, other=0.0)) / (SIZE * SIZE)
        at, inside = _place(view, y, x, SIZE)
        red = tl.load(planes + at, mask=inside, other=0.0).to(tl.float32)
        green = tl.load(planes + at + SIZE * SIZE, mask=inside, other=0.0).to(tl.float32)
        blue = tl.load(planes + at + 2 * SIZE * SIZE, mask=inside, other=0.0).to(tl.float32)
        red, green, blue = _blend(red, green, blue, _strength(row, 1), level)
        red, green, blue = _recolour(red, green, blue, row, contrast + 1, 4)
        _hand_on(red, green, blue, row, planes, out, view, images, views, y, x, mean_3, scale_3, SIZE)


@triton.jit
def blur_columns_kernel(
    rows, planes, blurred, SIZE: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    view, y, x = _tile(SIZE, TILE, False)
    row = rows + view * WORDS
    radius = tl.load(row + _RADIUS)
    if radius > 0:
        at, inside = _place(view, y, x, SIZE)
        first = view.to(tl.int64) * (3 * SIZE * SIZE) + x[None, :]
        slope, scale = _gaussian(row, radius, REACH)
        for c in tl.static_range(3):
            plane = planes + c * SIZE * SIZE
            value = tl.load(plane + at, mask=inside, other=0.0).to(tl.float32)
            for t in range(1, radius + 1):
                before = tl.load(plane + first + _before(y, t)[:, None] * SIZE, mask=inside, other=0.0)
                after = tl.load(plane + first + _after(y, t, SIZE)[:, None] * SIZE, mask=inside, other=0.0)
                value += tl.exp(slope * t * t) * (before.to(tl.float32) + after.to(tl.float32))
            tl.store(blurred + c * SIZE * SIZE + at, (value * scale).to(blurred.dtype.element_ty), mask=inside)


@triton.jit
def blur_rows_kernel(
    rows, blurred, REACH: tl.constexpr, out, images, views, mean_3, scale_3, SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    view, y, x = _tile(SIZE, TILE, True)
    row = rows + view * WORDS
    radius = tl.load(row + _RADIUS)
    if radius > 0:
        at, inside = _place(view, y, x, SIZE)
        first = view.to(tl.int64) * (3 * SIZE * SIZE) + y[:, None] * SIZE
        slope, scale = _gaussian(row, radius, REACH)
        solarize = (tl.load(row + _FLAGS) & _SOLARIZE) != 0
        for c in tl.static_range(3):
            plane = blurred + c * SIZE * SIZE
            value = tl.load(plane + at, mask=inside, other=0.0).to(tl.float32)
            for t in range(1, radius + 1):
                before = tl.load(plane + first + _before(x, t)[None, :], mask=inside, other=0.0)
                after = tl.load(plane + first + _after(x, t, SIZE)[None, :], mask=inside, other=0.0)
                value += tl.exp(slope * t * t) * (before.to(tl.float32) + after.to(tl.float32))
            _write(value * scale, solarize, out, c, view, images, views, y, x, mean_3[c], scale_3[c], SIZE)


# ---- where a program works


@triton.jit
def _tile(SIZE: tl.constexpr, TILE: tl.constexpr, ONE_EACH: tl.constexpr):
    """This program's view, and the rows and columns of its tile (some may lie outside the view).

    ONE_EACH: threads of a warp lie side by side in a row. Otherwise Triton sees that 16-bit planes can be stored eight
    pixels a thread and lays a warp over eight rows; loads that can't be so wide would then touch eight times the lines.
    """
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE  # Triton 3.6 has no tl.cdiv of constants
    view = tl.program_id(0) // (ACROSS * ACROSS)
    tile = tl.program_id(0) % (ACROSS * ACROSS)
    y = tile // ACROSS * TILE + tl.arange(0, TILE)
    x = tile % ACROSS * TILE + tl.arange(0, TILE)
    if ONE_EACH:
        x = tl.max_contiguous(x, 1)
    return view, y, x


@triton.jit
def _place(view, y, x, SIZE: tl.constexpr):
    """Where a tile's pixels lie in the first plane of their view, and which are inside."""
    at = view.to(tl.int64) * (3 * SIZE * SIZE) + y[:, None] * SIZE + x[None, :]
    return at, (y[:, None] < SIZE) & (x[None, :] < SIZE)


@triton.jit
def _store_planes(red, green, blue, planes, view, y, x, SIZE: tl.constexpr):
    at, inside = _place(view, y, x, SIZE)
    dtype = planes.dtype.element_ty
    tl.store(planes + at, red.to(dtype), mask=inside)
    tl.store(planes + at + SIZE * SIZE, green.to(dtype), mask=inside)
    tl.store(planes + at + 2 * SIZE * SIZE, blue.to(dtype), mask=inside)


@triton.jit
def _hand_on(
    red, green, blue, row, planes, out, view, images, views, y, x, mean_3, scale_3, SIZE: tl.constexpr
):  # fmt: skip
    """What follows the colour operations: gray, then the planes for a blur, or the output."""
    flags = tl.load(row + _FLAGS)
    if (flags & _GRAY) != 0:
        red = _gray(red, green, blue)
        green = red
        blue = red
    if tl.load(row + _RADIUS) > 0:
        _store_planes(red, green, blue, planes, view, y, x, SIZE)
    else:
        solarize = (flags & _SOLARIZE) != 0
        _write(red, solarize, out, 0, view, images, views, y, x, mean_3[0], scale_3[0], SIZE)
        _write(green, solarize, out, 1, view, images, views, y, x, mean_3[1], scale_3[1], SIZE)
        _write(blue, solarize, out, 2, view, images, views, y, x, mean_3[2], scale_3[2], SIZE)


@triton.jit
def _write(value, solarize, out, channel, view, images, views, y, x, mean, scale, SIZE: tl.constexpr):
    """Solarises, normalises and writes one channel of a tile."""
    value = tl.where(solarize & (value >= 0.5), 1.0 - value, value)
    place = (view % views) * images + view // views
    at = (place.to(tl.int64) * (SIZE * SIZE) + y[:, None] * SIZE + x[None, :]) * 3 + channel
    inside = (y[:, None] < SIZE) & (x[None, :] < SIZE)
    tl.store(out + at, ((value - mean) * scale).to(out.dtype.element_ty), mask=inside)


# ---- crop and resize


@triton.jit
def _crop(pixels, row, y, x, SIZE: tl.constexpr):
    """The tile's pixels in 0…1, from the bytes under a triangle as wide as two of the coarser grid's steps.

    That is torch's and Pillow's antialiased bilinear filter. Taps beyond an edge weigh nothing and read the edge, so
    that no load needs a mask. Columns' weights are computed anew for every row of taps: they are one number a thread.
    """
    low = tl.load(row).to(tl.int64) & 0xFFFFFFFF
    pixels += (tl.load(row + 1).to(tl.int64) << 32) | low
    stride = tl.load(row + _STRIDE).to(tl.int64)
    height = tl.load(row + _HEIGHT)
    width = tl.load(row + _WIDTH)
    if (tl.load(row + _FLAGS) & _FLIP) != 0:
        x = SIZE - 1 - x
    centre_y, slope_y, first_y = _triangle(y, height, SIZE)
    centre_x, slope_x, first_x = _triangle(x, width, SIZE)
    red = tl.zeros((y.shape[0], x.shape[0]), dtype=tl.float32)
    green = tl.zeros_like(red)
    blue = tl.zeros_like(red)
    total_y = tl.zeros((y.shape[0],), dtype=tl.float32)
    total_x = tl.zeros((x.shape[0],), dtype=tl.float32)
    for i in range(_taps(height, SIZE)):
        weight_y = _weight(first_y + i, height, centre_y, slope_y)
        total_y += weight_y
        line = pixels + tl.minimum(first_y + i, height - 1) * stride
        total_x = tl.zeros_like(total_x)
        for j in range(_taps(width, SIZE)):
            weight_x = _weight(first_x + j, width, centre_x, slope_x)
            total_x += weight_x
            source = line[:, None] + (3 * tl.minimum(first_x + j, width - 1))[None, :]
            weight = weight_y[:, None] * weight_x[None, :]
            red += weight * tl.load(source).to(tl.float32)
            green += weight * tl.load(source + 1).to(tl.float32)
            blue += weight * tl.load(source + 2).to(tl.float32)
    scale = 1.0 / (255.0 * total_y[:, None] * total_x[None, :])
    return red * scale, green * scale, blue * scale


@triton.jit
def _taps(length, SIZE: tl.constexpr):
    """The most source pixels that lie under a triangle: ceil(2 support)."""
    return tl.maximum((2 * length + SIZE - 1) // SIZE, 2)


@triton.jit
def _triangle(place, length, SIZE: tl.constexpr):
    """Centre and slope of the triangle over each output pixel, and the first source pixel under it."""
    scale = length.to(tl.float32) / SIZE
    support = tl.maximum(scale, 1.0)
    # Pixels of a tile outside the view take the first one's triangle instead: what they read must exist.
    place = tl.where((place >= 0) & (place < SIZE), place, 0)
    centre = scale * (place.to(tl.float32) + 0.5)
    return centre, 1.0 / support, tl.maximum(centre - support + 0.5, 0.0).to(tl.int32)


@triton.jit
def _weight(tap, length, centre, slope):
    weight = 1.0 - slope * tl.abs(tap.to(tl.float32) + 0.5 - centre)
    return tl.where(tap < length, tl.maximum(weight, 0.0), 0.0)


# ---- colours


@triton.jit
def _contrast_place(row):
    """How many operations come before contrast; _NONE without it."""
    place = _NONE
    for k in tl.static_range(4):
        place = tl.where(tl.load(row + _ORDER + k) == 1, k, place)
    return place


@triton.jit
def _strength(row, operation):
    return tl.load(row + _STRENGTH + operation).to(tl.float32, bitcast=True)


@triton.jit
def _recolour(red, green, blue, row, first, last):
    """The operations at places first…last-1 of the order, none of which is contrast."""
    for k in range(first, last):
        operation = tl.load(row + _ORDER + k)
        if operation == 0:
            red, green, blue = _blend(red, green, blue, _strength(row, 0), 0.0)
        elif operation == 2:
            red, green, blue = _blend(red, green, blue, _strength(row, 2), _gray(red, green, blue))
        elif operation == 3:
            red, green, blue = _turn_hue(red, green, blue, _strength(row, 3))
    return red, green, blue


@triton.jit
def _unit(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _blend(red, green, blue, factor, level):
    """Away from or towards a level: black for brightness, the mean gray for contrast, a pixel's own for saturation."""
    rest = (1.0 - factor) * level
    return _unit(factor * red + rest), _unit(factor * green + rest), _unit(factor * blue + rest)


@triton.jit
def _gray(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _turn_hue(red, green, blue, turn):
    """Turns the hue of HSV colours. Hues here count six to the circle; gray pixels have none and stay as they are."""
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - tl.minimum(tl.minimum(red, green), blue)
    inverse = 1.0 / tl.where(chroma > 0.0, chroma, 1.0)
    from_green = tl.where(high == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0)
    hue = tl.where(high == red, (green - blue) * inverse, from_green) + 6.0 * turn
    return high - chroma * _shade(hue + 5.0), high - chroma * _shade(hue + 3.0), high - chroma * _shade(hue + 1.0)


@triton.jit
def _shade(k):
    """How far a channel lies below the highest one, in units of the chroma: max(0, min(k, 4 - k, 1)) with k modulo 6.

    The branch-free form of HSV to RGB: k is the hue's distance from the channel's own place on the circle.
    """
    k -= 6.0 * tl.floor(k * (1.0 / 6.0))
    return _unit(tl.minimum(k, 4.0 - k))


# ---- blur


@triton.jit
def _gaussian(row, radius, REACH: tl.constexpr):
    """slope and scale of the weights scale · exp(slope · t²) at distances t ≤ radius; their sum is one.

    REACH: a power of two, at least the side of a view.
    """
    sigma = tl.load(row + _SIGMA).to(tl.float32, bitcast=True)
    slope = tl.maximum(-0.5 / (sigma * sigma), -1e30)  # finite, as it is multiplied by zero
    t = tl.arange(0, REACH)
    one_side = tl.sum(tl.where(t <= radius, tl.exp(slope * t * t), 0.0))
    return slope, 1.0 / (2.0 * one_side - 1.0)


@triton.jit
def _before(place, t):
    """t places before, reflected at the first."""
    return tl.abs(place - t)


@triton.jit
def _after(place, t, SIZE: tl.constexpr):
    """t places after, reflected at the last."""
    return SIZE - 1 - tl.abs(SIZE - 1 - place - t)
