"""Charts as SVG for the pages: matplotlib draws, colours become the page's variables, and text stays text.

A unit is a pixel where a page shows a chart at its own width, so FONT is what a reader sees.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fasttrain.page.numbers import ended, tick_label
from fasttrain.page.points import smoothed, thinned
from fasttrain.page.shell import text
from fasttrain.page.style import ACCENT, COLOURS, INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, FONT = 368, 220, 12
CHARACTER = 6.8  # width of one, of a text of that size, in a wide font
FEW = 40  # values that are shown as they are, without a mean
RC: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": FONT, "text.color": INK, "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "path.simplify": True,
}  # fmt: skip


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


@contextlib.contextmanager
def canvas(width: float = WIDTH, height: float = HEIGHT) -> Iterator[Figure]:
    """An empty figure of so many pixels. It has to be drawn, and given to `svg`, inside the with."""
    import matplotlib
    from matplotlib.figure import Figure  # here: it takes a second that other commands need not wait

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font used to measure lacks
        yield Figure(figsize=(width / 72, height / 72))


def svg(figure: Figure, alt: str) -> str:
    """A figure as an SVG element in the page's colours (see style.COLOURS). alt: what it shows, in words.

    A gid "class:NAME" of an artist becomes its class; other ids go, but those that the drawing refers to.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True)
    whole = drawn.getvalue()
    width, height = (72 * side for side in figure.get_size_inches())
    inside = whole[whole.index(">", whole.index("<svg")) + 1 :]
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'<g id="class:([^"]*)"', r'<g class="\1"', inside)
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    inside = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", inside)
    inside = re.sub(r' (?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), inside)
    inside = re.sub(r"\s+", " ", inside).replace("> <", "><").replace("<defs></defs>", "").replace("<g/>", "")
    inside = inside.replace("xlink:href", "href")
    for name, (light, _) in COLOURS.items():
        inside = inside.replace(light, f"var(--{name})")
    return f'<svg role="img" aria-label="{text(alt)}" viewBox="0 0 {width:g} {height:g}">{inside}'


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
        ticks = _ticks(low, high, 4)
        labels = [tick_label(value, ticks) for value in ticks]
        beside = [*(_end(line, len(lines) > 1, high - low) for line in lines if line.named),
                  *((value, f"{name} {ended(value, high - low)}", SOFT) for value, name in references)]  # fmt: skip
        words = labels, [label for _, label, _ in beside]
        left, right = (10 + CHARACTER * max(map(len, each), default=0) for each in words)
        axes = _axes(figure, left, right)
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


def _ticks(low: float, high: float, number: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(number, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def _axes(figure: Figure, left: float, right: float, top: float = 20, bottom: float = 26) -> Axes:
    """The part of a figure inside these margins, in pixels, with nothing but a grid in the y direction."""
    width, height = (72 * side for side in figure.get_size_inches())
    box = left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height
    axes = figure.add_axes(box)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    return axes


def _steps_below(axes: Axes, scale: Scale | None) -> None:
    """Labels of the x axis in steps, and in epochs and hours, of which the page shows one."""
    low, high = axes.get_xlim()
    ticks = [tick for tick in _ticks(low, high, 4) if scale is None or tick == round(tick)] or [round(high)]
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
    if not (smooth and line.bare):
        axes.plot(
        *thinned(x_N, y_N), color=line.colour, linewidth=1 if smooth else 1.8, alpha=0.35 if smooth else 1,
        marker=marker, markersize=5, clip_on=False,
    )  # fmt: skip
    if smooth:
        y_N = smoothed(y_N)
        axes.plot(*thinned(x_N, y_N), color=line.colour, linewidth=2, clip_on=False)
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
        axes.text(1.02, y, label, transform=axes.get_yaxis_transform(), va="center", color=colour)


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


def ridges(rows: Sequence[tuple[str, Sequence[Sequence[float]]]], colours: Sequence[str], alt: str) -> str:
    """Distributions over [-1, 1], a row for each label, those of a row over one another; counts in equal bins."""
    shares = [[_shares(counts) for counts in each] for _, each in rows]
    with canvas(height=52 + 24 * len(rows)) as figure:
        left = 10 + CHARACTER * max(len(label) for label, _ in rows)
        axes = _axes(figure, left, 10, top=24, bottom=26)
        bins = len(shares[0][0])
        centre_N = (np.arange(bins) + 0.5) * 2 / bins - 1
        seen = np.flatnonzero(np.max([share for each in shares for share in each], axis=0) > 0.002)
        low, high = (centre_N[seen[0]] - 2 / bins, centre_N[seen[-1]] + 2 / bins) if len(seen) else (-1, 1)
        tallest = max(float(np.max(share)) for each in shares for share in each) or 1.0
        for row, each in enumerate(shares):
            base = len(rows) - 1 - row
            for share_N, colour in zip(each, colours, strict=True):
                top_N = base + 1.6 * share_N / tallest
                axes.fill_between(centre_N, base, top_N, color=colour, alpha=0.3, linewidth=0, zorder=row + 2)
                axes.plot(centre_N, top_N, color=colour, linewidth=1.2, zorder=row + 2)
        axes.set_xlim(max(low, -1), min(high, 1))
        axes.set_ylim(-0.05, len(rows) + 0.7)
        axes.grid(visible=False)
        axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
        ticks = _ticks(max(low, -1), min(high, 1), 5)
        axes.set_xticks(ticks, [tick_label(tick, ticks) for tick in ticks])
        return svg(figure, alt)


def _shares(counts: Sequence[float]) -> np.ndarray:
    """Of all counts, each one's."""
    count_N = np.asarray(counts, float)
    return count_N / max(count_N.sum(), 1e-12)
