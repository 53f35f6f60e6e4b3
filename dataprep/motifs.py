"""Ten repeated motifs (dots, rings, bricks, ...) and how an image of one is drawn.

Colour, contrast sign, scale, phase, tilt, lighting and noise are drawn anew for every image, so pixels and mean colours
say little about the motif, while nearly every crop still shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One value per pixel, (H, W) or broadcastable to it, kept in float32 for speed; lengths are in motif periods.
Field = NDArray[np.floating[Any]]
Tiling = tuple[Field, Field, Field]  # signed distance to the motif's edge (negative inside), row and column of the cell
Motif = Callable[[Field, Field, np.random.Generator], Tiling]

MIN_SIDE, MAX_SIDE = 96, 500  # px
CELLS = 16  # cells repeat their colour and jitter after this many rows and columns, more than an image shows


def disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.32


def ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.32) - 0.09


def cross(x: Field, y: Field) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.11, np.maximum(x, y) - 0.43)


def triangle(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.23


def star(x: Field, y: Field) -> Field:
    """Five points: the angle is folded onto half a point, whose edge is one straight line from tip to notch."""
    tip, notch, half = np.float32(0.48), np.float32(0.19), np.float32(np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(x, -y), 2 * half) - half)
    radius = np.hypot(x, y)
    edge = np.array([notch * np.cos(half) - tip, notch * np.sin(half)], np.float32)
    edge /= np.hypot(*edge)
    return (radius * np.cos(half - angle) - tip) * edge[1] - radius * np.sin(half - angle) * edge[0]


def scattered(shape: Callable[[Field, Field], Field], u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    """Repeats a shape on a staggered lattice, each copy a little moved, turned and resized."""
    row = np.floor(v)
    u = u + 0.5 * np.mod(row, 2)
    column = np.floor(u)
    cell = cell_index(row, column)
    shift_x, shift_y, turn = rng.uniform(-1, 1, (3, CELLS * CELLS)).astype(np.float32)
    size = rng.uniform(0.85, 1.1, CELLS * CELLS).astype(np.float32)
    x, y = u - column - 0.5 - 0.06 * shift_x[cell], v - row - 0.5 - 0.06 * shift_y[cell]
    cos, sin = (np.cos(0.3 * turn) / size)[cell], (np.sin(0.3 * turn) / size)[cell]
    return shape(x * cos - y * sin, x * sin + y * cos), row, column


def stripes(u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    row = np.floor(v)
    return np.abs(v - row - 0.5) - 0.25, row, np.zeros_like(row)


def waves(u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    """Zigzag stripes."""
    return stripes(u, v + 0.8 * np.abs(u * 0.8 - np.floor(u * 0.8) - 0.5), rng)


def checks(u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    row, column = np.floor(2 * v), np.floor(2 * u)
    edge = 0.25 - np.maximum(np.abs(2 * u - column - 0.5), np.abs(2 * v - row - 0.5)) / 2
    return np.where(np.mod(row + column, 2) == 0, -edge, edge), row, column


def bricks(u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    row = np.floor(2 * v)
    u = u + 0.5 * np.mod(row, 2)
    column = np.floor(u)
    return np.maximum(np.abs(u - column - 0.5) - 0.43, np.abs(v - (row + 0.5) / 2) - 0.18), row, column


def honeycomb(u: Field, v: Field, rng: np.random.Generator) -> Tiling:
    """Hexagon centres lie on two interleaved rectangular lattices; a pixel belongs to the nearer centre."""
    height = np.float32(3**0.5)
    near = [np.round(u), np.round(v / height)]
    far = [np.floor(u) + 0.5, np.floor(v / height) + 0.5]
    second = np.hypot(u - far[0], v - far[1] * height) < np.hypot(u - near[0], v - near[1] * height)
    column, row = np.where(second, far[0], near[0]), np.where(second, far[1], near[1])
    x, y = np.abs(u - column), np.abs(v - row * height)
    return np.maximum(x, x * 0.5 + y * 0.866) - 0.41, 2 * row, np.floor(column)


MOTIFS: dict[str, Motif] = {
    "bricks": bricks,
    "checks": checks,
    "crosses": partial(scattered, cross),
    "dots": partial(scattered, disc),
    "honeycomb": honeycomb,
    "rings": partial(scattered, ring),
    "stars": partial(scattered, star),
    "stripes": stripes,
    "triangles": partial(scattered, triangle),
    "waves": waves,
}


def cell_index(row: Field, column: Field) -> NDArray[np.intp]:
    """Index (H, W) into a table of CELLS² entries."""
    return (np.mod(row, CELLS) * CELLS + np.mod(column, CELLS)).astype(np.intp)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in px, each within 96-500, neither more than twice the other."""
    width = int(rng.integers(MIN_SIDE, MAX_SIDE + 1))
    height = int(rng.integers(max(MIN_SIDE, (width + 1) // 2), min(MAX_SIDE, 2 * width) + 1))
    return width, height


def motif_plane(width: int, height: int, period: float, rng: np.random.Generator) -> tuple[Field, Field]:
    """Coordinates u, v (H, W) in motif periods: shifted by a random phase, tilted up to 20 degrees, gently bent."""
    tilt, bend = rng.uniform(-0.35, 0.35), rng.uniform(0, 0.12)
    phase = rng.uniform(0, CELLS, 4)
    x = (np.arange(width, dtype=np.float32) / np.float32(period))[None, :]
    y = (np.arange(height, dtype=np.float32) / np.float32(period))[:, None]
    x = x + np.float32(bend) * np.sin(1.7 * y + np.float32(phase[2]))
    y = y + np.float32(bend) * np.sin(1.7 * x + np.float32(phase[3]))
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    return x * cos - y * sin + np.float32(phase[0]), x * sin + y * cos + np.float32(phase[1])


def colours(count: int, lightness: float, hue_spread: float, rng: np.random.Generator) -> Field:
    """RGB (count, 3), 0-255, around one lightness (0-1) and one random hue."""
    hue = 2 * np.pi * (rng.random() + hue_spread * rng.uniform(-0.5, 0.5, (count, 1)))
    light = lightness + rng.uniform(-0.1, 0.1, (count, 1))
    wheel = np.cos(hue - 2 * np.pi / 3 * np.arange(3))
    return (255 * np.clip(light + rng.uniform(0.1, 0.25) * wheel, 0, 1)).astype(np.float32)


def blend_corners(corners: Field, height: int, width: int) -> Field:
    """A smooth (H, W, 3) field from the values (4, 3) at the four corners."""
    x = np.linspace(0, 1, width, dtype=np.float32)[:, None]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    top, bottom = corners[0] * (1 - x) + corners[1] * x, corners[2] * (1 - x) + corners[3] * x
    return top * (1 - y) + bottom * y


def add_blobs(pixels: Field, rng: np.random.Generator) -> None:
    """Covers small parts of pixels (H, W, 3), in place, with up to three soft-edged discs."""
    height, width, _ = pixels.shape
    for _ in range(int(rng.integers(0, 4))):
        radius = int(min(height, width) * rng.uniform(0.05, 0.12))
        left, top = int(rng.integers(0, width - 2 * radius)), int(rng.integers(0, height - 2 * radius))
        ramp = (np.arange(2 * radius, dtype=np.float32) - (radius - 0.5)) / radius
        cover = np.clip(4 - 4 * np.hypot(ramp[:, None], ramp), 0, 1)[..., None]
        patch = pixels[top : top + 2 * radius, left : left + 2 * radius]
        patch += cover * (colours(1, rng.uniform(0.2, 0.8), 1, rng) - patch)


def draw(motif: Motif, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image (H, W, 3) of the motif, everything but the motif drawn from rng."""
    width, height = draw_size(rng)
    period = min(width, height) / rng.uniform(2.5, 5)
    u, v = motif_plane(width, height, period, rng)
    distance, row, column = motif(u, v, rng)
    dark, light = rng.uniform(0.15, 0.35), rng.uniform(0.6, 0.85)
    front, back = (dark, light) if rng.integers(2) else (light, dark)
    paint = colours(CELLS * CELLS, front, 1.0, rng)[cell_index(row, column)]
    pixels = blend_corners(colours(4, back, 1.0, rng), height, width)
    pixels += np.clip(0.5 - distance * np.float32(period), 0, 1)[..., None] * (paint - pixels)
    add_blobs(pixels, rng)
    pixels *= blend_corners(rng.uniform(0.75, 1.25, (4, 1)).astype(np.float32), height, width)
    pixels += rng.uniform(2, 10) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)
