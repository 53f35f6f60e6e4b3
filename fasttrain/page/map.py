"""A map of images as SVG: a point for each, all of a class in one path, in colours that everyone can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasttrain.page.shell import text

WIDTH, LOW, HIGH, EDGE, FONT = 368, 140, 320, 10, 12  # pixels at the size it is shown in, between LOW and HIGH high
CHARACTER = 8.2  # width of one at most, of a bold text of that size
SHAPES = "dot", "box", "cross"
LONGEST = 18  # characters of a label
LEAST, CLOSE = 5, 0.6  # points that a label stands for, and how far from their middle, in parts of what all points are


class Group(NamedTuple):
    """Points of one look: their places among all, a colour by its number, a shape of SHAPES ("": they are drawn as
    others), what that stands for, and whether their middle is marked with the same words."""

    index_N: np.ndarray
    colour: int
    shape: str
    name: str = ""
    marked: bool = False


def drawn(map_N2: np.ndarray, groups: Sequence[Group], alt: str) -> str:
    """The map as an SVG element. alt: what it shows, in words."""
    at_N2, height = _fitted(map_N2)
    paths = (
        f'<path class="{group.shape} m{group.colour}" d="{_marks(at_N2[group.index_N], group.shape)}"/>'
        for group in groups
        if group.shape and len(group.index_N)
    )
    labels = "".join(
        f'<text x="{x:.0f}" y="{y:.0f}">{text(label)}</text>' for x, y, label in _labels(at_N2, height, groups)
    )
    return (
        f'<svg class=map role="img" aria-label="{text(alt)}" viewBox="0 0 {WIDTH} {height}">{"".join(paths)}{labels}'
        "</svg>"
    )


def keys(groups: Sequence[Group]) -> str:
    """What the colours and shapes stand for; "" where nothing is to be said."""
    words = "".join(
        f'<span class="key {each.shape} m{each.colour}" title="{text(each.name)}">{text(shortened(each.name))}</span> '
        for each in groups
        if each.shape and each.name
    )
    return f"<p class=keys>{words}</p>" if words else ""


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _fitted(map_N2: np.ndarray) -> tuple[np.ndarray, int]:
    """Coordinates in pixels, both axes on one scale, outliers beyond a thousandth at the edge; and the map's height."""
    low_2, high_2 = np.quantile(map_N2, (0.001, 0.999), axis=0)
    wide, tall = np.maximum(high_2 - low_2, 1e-9)
    scale = min((WIDTH - 2 * EDGE) / wide, (HIGH - 2 * EDGE) / tall)
    height = round(max(LOW, scale * tall + 2 * EDGE))
    middle_2 = np.array([WIDTH, height]) / 2
    moved_N2 = (map_N2 - (low_2 + high_2) / 2) * (scale, -scale)
    return middle_2 + np.clip(moved_N2, EDGE / 2 - middle_2, middle_2 - EDGE / 2), height


def _marks(at_N2: np.ndarray, shape: str) -> str:
    """A dot and a box are lines without a length, whose ends the style sheet makes round or square."""
    mark = "h0" if shape != "cross" else "l4 4m-4 0l4-4"
    moved_N2 = at_N2 - (2 if shape == "cross" else 0)
    return "".join(f"M{x:.1f} {y:.1f}{mark}" for x, y in moved_N2)


def _labels(at_N2: np.ndarray, height: int, groups: Sequence[Group]) -> list[tuple[float, float, str]]:
    """Middle and words of the labels that fit, those of the closest groups first; a group that is all over has no
    middle."""
    spots = []
    everywhere = CLOSE * _spread(at_N2)
    for group in groups:
        here_N2 = at_N2[group.index_N]
        if group.marked and len(here_N2) >= LEAST:
            spots.append((_spread(here_N2), np.median(here_N2, axis=0), shortened(group.name)))
    placed: list[tuple[float, float, float, str]] = []
    for _, (x, y), label in sorted((spot for spot in spots if spot[0] < everywhere), key=lambda spot: spot[0]):
        half = CHARACTER * len(label) / 2 + 2
        x, y = float(np.clip(x, half, WIDTH - half)), float(np.clip(y + FONT / 3, FONT, height - 4))
        if all(abs(x - left) > half + other or abs(y - top) > FONT + 2 for left, top, other, _ in placed):
            placed.append((x, y, half, label))
    return [(x, y, label) for x, y, _, label in placed]


def _spread(at_N2: np.ndarray) -> float:
    """How far points are from their middle, at the median."""
    return float(np.median(np.linalg.norm(at_N2 - np.median(at_N2, axis=0), axis=1)))
