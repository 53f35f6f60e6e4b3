"""Distributions over training as SVG: a row for each step, positives and negatives over one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasttrain.page.canvas import CHARACTER, canvas, plain_axes, svg, ticks_between
from fasttrain.page.numbers import tick_label

NARROWEST = 0.4  # of the axis: scores that are all the same are to look it


def ridges(rows: Sequence[tuple[str, Sequence[Sequence[float]]]], colours: Sequence[str], alt: str) -> str:
    """Distributions over [-1, 1], a row for each label, those of a row over one another; counts in equal bins."""
    shares = [[_shares(counts) for counts in each] for _, each in rows]
    with canvas(height=52 + 24 * len(rows)) as figure:
        left = 10 + CHARACTER * max(len(label) for label, _ in rows)
        axes = plain_axes(figure, left, 18, top=24, bottom=26)
        bins = len(shares[0][0])
        centre_N = (np.arange(bins) + 0.5) * 2 / bins - 1
        seen = np.flatnonzero(np.max([share for each in shares for share in each], axis=0) > 0.002)
        low, high = (centre_N[seen[0]] - 2 / bins, centre_N[seen[-1]] + 2 / bins) if len(seen) else (-1, 1)
        for row, each in enumerate(shares):
            base, tallest = len(rows) - 1 - row, max(float(np.max(share)) for share in each) or 1.0
            for share_N, colour in zip(each, colours, strict=True):
                top_N = base + 1.6 * share_N / tallest
                axes.fill_between(centre_N, base, top_N, color=colour, alpha=0.3, linewidth=0, zorder=row + 2)
                axes.plot(centre_N, top_N, color=colour, linewidth=1.2, zorder=row + 2)
        half = min(max((high - low) / 2, NARROWEST / 2), 1)
        middle = np.clip((low + high) / 2, half - 1, 1 - half)
        low, high = middle - half, middle + half
        axes.set_xlim(low, high)
        axes.set_ylim(-0.05, len(rows) + 0.7)
        axes.grid(visible=False)
        axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
        ticks = ticks_between(low, high, 5)
        axes.set_xticks(ticks, [tick_label(tick, ticks) for tick in ticks])
        return svg(figure, alt)


def _shares(counts: Sequence[float]) -> np.ndarray:
    """Of all counts, each one's."""
    count_N = np.asarray(counts, float)
    return count_N / max(count_N.sum(), 1e-12)
