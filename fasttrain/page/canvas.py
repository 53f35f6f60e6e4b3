"""What charts are drawn on, as SVG: matplotlib draws, colours become the page's variables, and text stays text.

A unit is a pixel where a page shows a chart at its own width, so FONT is what a reader sees.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fasttrain.page.shell import text
from fasttrain.page.style import COLOURS, INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, FONT = 368, 220, 12
CHARACTER = 6.8  # width of one, of a text of that size, in a wide font
RC: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": FONT, "text.color": INK, "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "path.simplify": True,
}  # fmt: skip


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


def ticks_between(low: float, high: float, number: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(number, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def plain_axes(figure: Figure, left: float, right: float, top: float = 20, bottom: float = 26) -> Axes:
    """The part of a figure inside these margins, in pixels, with nothing but a grid in the y direction."""
    width, height = (72 * side for side in figure.get_size_inches())
    box = left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height
    axes = figure.add_axes(box)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    return axes
