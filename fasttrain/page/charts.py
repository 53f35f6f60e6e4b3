"""Curves as SVG: lines over steps, with their values at their ends, levels to compare with, and events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fasttrain.page.canvas import CHARACTER, FONT, HEIGHT, WIDTH, canvas, plain_axes, svg, ticks_between
from fasttrain.page.numbers import ended, tick_label
from fasttrain.page.points import smoothed, thinned
from fasttrain.page.style import ACCENT, SERIES, SOFT, SOLID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 40  # values that are shown as they are, without a mean


class Line(NamedTuple):
    """A curve. name: short, shown at its end beside others, if named. smooth: with a mean over the values around each,
    which is alone if bare. points: each value is marked."""

    name: str
    x_N: Sequence[float]
    y_N: Sequence[float]
    colour: str = ACCENT
    smooth: bool = False
    points: bool = False
    named: bool = True
    bare: bool = False


class Scale(NamedTuple):
    """What the steps below a chart are in epochs and hours."""

    epoch: Callable[[float], float]
    hours: Callable[[float], float]


def curves(
    lines: Sequence[Line], alt: str, scale: Scale | None = None, references: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (), most: float = math.inf, width: float = WIDTH,
) -> str:  # fmt: skip
    """Lines over steps, with their values at their ends, on an axis that shows what moves.

    references: (value, name) of levels to compare with. marks: (step, name) of events. most: the greatest value there
    can be. Values that are not finite are gaps. alt: what the chart shows; what the lines do is added to it.
    """
    with canvas(width, HEIGHT if width == WIDTH else 1.4 * HEIGHT) as figure:
        low, high = _limits(lines, [value for value, _ in references], most)
        ticks = ticks_between(low, high, 4)
        labels = [tick_label(value, ticks) for value in ticks]
        beside = [*(_end(line, len(lines) > 1, high - low) for line in lines if line.named),
                  *((value, f"{name} {ended(value, high - low)}", SOFT) for value, name in references)]  # fmt: skip
        words = labels, [label for _, label, _ in beside]
        left, right = (10 + CHARACTER * max(map(len, each), default=0) for each in words)
        axes = plain_axes(figure, left, right)
        x_N = [x for line in lines for x in line.x_N] or [0.0, 1.0]
        single = min(x_N) == max(x_N)
        axes.set_xlim(min(x_N) - single, max(x_N) + single)
        axes.set_ylim(low, high)
        axes.set_yticks(ticks, labels)
        _steps_below(axes, scale)
        _marked(axes, marks)
        for value, _ in references:
            axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        for line in lines:
            _draw(axes, line, low, high)
        _beside(axes, beside, low, high)
        said = "; ".join(_in_words(line, len(lines) > 1, high - low) for line in lines)
        return svg(figure, f"{alt}: {said}" + "".join(f"; {name} {value:.4g}" for value, name in references))


def _marked(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """Events: a line at the step of each, with its name above where that finds room."""
    low, high = axes.get_xlim()
    width, free = axes.bbox.width * 72 / axes.figure.dpi, -math.inf
    for step, name in marks:
        place, half = (step - low) / (high - low) * width, CHARACTER * len(name) / 2
        if not 0 <= place <= width:
            continue
        axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
        if place - half > free and place + half < width + 20:
            axes.text(step, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=SOFT)
            free = place + half + CHARACTER


def _steps_below(axes: Axes, scale: Scale | None) -> None:
    """Labels of the x axis in steps, and in epochs and hours, of which the page shows one."""
    low, high = axes.get_xlim()
    ticks = [tick for tick in ticks_between(low, high, 4) if scale is None or tick == round(tick)] or [round(high)]
    axes.set_xticks([])
    kinds: dict[str, Callable[[float], str]] = {"step": lambda x: tick_label(x, ticks)}
    if scale is not None:
        kinds |= {"epoch": lambda x: f"{scale.epoch(x):.3g}", "hours": lambda x: f"{scale.hours(x):.2g} h"}
    for kind, label in kinds.items():
        for tick in ticks:
            place = (
                "right"
                if tick > high - 0.06 * (high - low)
                else "left"
                if tick < low + 0.06 * (high - low)
                else "center"
            )
            axes.text(
                tick, -0.04, label(tick), transform=axes.get_xaxis_transform(), ha=place, va="top", color=SOFT,
                gid=f"class:x-{kind}" if scale is not None else None,
            )  # fmt: skip


def _draw(axes: Axes, line: Line, low: float, high: float) -> None:
    x_N, y_N = np.asarray(line.x_N, float), np.clip(np.asarray(line.y_N, float), low, high)
    marker = "o" if line.points or np.isfinite(y_N).sum() == 1 else None
    smooth = line.smooth and len(y_N) >= FEW
    style = (0, (5, 1.5)) if line.colour in SERIES[SOLID:] else "-"
    if not (smooth and line.bare):
        axes.plot(
            *thinned(x_N, y_N), color=line.colour, linestyle=style, linewidth=1 if smooth else 1.8,
            alpha=0.35 if smooth else 1, marker=marker, markersize=5, clip_on=False,
        )  # fmt: skip
    if smooth:
        y_N = smoothed(y_N)
        axes.plot(*thinned(x_N, y_N), color=line.colour, linestyle=style, linewidth=2, clip_on=False)
    if x_N.size and x_N[-1] < axes.get_xlim()[1]:  # it ends before others do
        axes.plot(x_N[-1:], y_N[-1:], color=line.colour, marker="o", markersize=5, clip_on=False)


def _beside(axes: Axes, labels: list[tuple[float, str, str]], low: float, high: float) -> None:
    """Labels (value, text, colour) at the right end of what they name, moved apart where they would overlap."""
    height = axes.bbox.height * 72 / axes.figure.dpi
    apart = (FONT + 3) * (high - low) / height
    placed: list[float] = []
    for value, *_ in sorted(labels):
        placed.append(max(min(max(value, low), high), placed[-1] + apart if placed else -math.inf))
    for at in range(len(placed) - 1, -1, -1):  # back from the top, where they ran over it
        limit = high if at == len(placed) - 1 else placed[at + 1] - apart
        placed[at] = min(placed[at], limit)
    for y, (_, label, colour) in zip(placed, sorted(labels), strict=True):
        axes.annotate(
            label, (1, y), (6, 0), axes.get_yaxis_transform(), "offset points", va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip


def _limits(lines: Sequence[Line], references: Sequence[float], most: float) -> tuple[float, float]:
    """Of the y axis: around what moves, spikes of single values left out, from 0 only where that is near."""
    shown = list(references)
    for line in lines:
        y_N = np.asarray(line.y_N, float)
        y_N = y_N[np.isfinite(y_N)]
        if len(y_N) >= FEW and line.smooth:
            shown += [*np.percentile(y_N, (1, 99)), *(smoothed(y_N)[[0, -1]])]
        elif len(y_N):
            shown += [y_N.min(), y_N.max()]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low <= 0.25 * high else low - room
    return float(max(bottom, 0.0) if low >= 0 else bottom), float(max(min(high + room, most), low + room / 8))


def _end(line: Line, named: bool, span: float) -> tuple[float, str, str]:
    """Where a line ends, what is said there, and in which colour."""
    finite = [y for y in line.y_N if math.isfinite(y)]
    y = finite[-1] if finite else 0.0
    if line.smooth and len(line.y_N) >= FEW and math.isfinite(mean := smoothed(np.asarray(line.y_N, float))[-1]):
        y = float(mean)
    said = ended(y, span) if finite else ""
    return y, f"{line.name} {said}".strip() if named else said, line.colour


def _in_words(line: Line, named: bool, span: float) -> str:
    values = [y for y in line.y_N if math.isfinite(y)]
    if not values:
        return f"{line.name} without a value".strip()
    first, last = ended(values[0], span), ended(values[-1], span)
    said = f"from {first} to {last}" if len(values) > 1 else first
    return f"{line.name} {said}" if named else said
