"""The points of a curve: as many as a chart can show, and the mean around each."""

from __future__ import annotations

import itertools

import numpy as np

BUCKETS = 160  # of a curve, each shown by its least and its greatest value


def smoothed(y_N: np.ndarray) -> np.ndarray:
    """The mean over the values around each, a 25th of all, gaps left out."""
    half = max(1, len(y_N) // 50)
    there_N = np.isfinite(y_N)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(there_N, y_N, 0.0), there_N))
    place_N = np.arange(len(y_N))
    reach_N = np.minimum(half, np.minimum(place_N, len(y_N) - 1 - place_N))
    reach_N = np.maximum(reach_N, half // 2)  # the ends, too, are means
    low_N, high_N = np.maximum(place_N - reach_N, 0), np.minimum(place_N + reach_N + 1, len(y_N))
    with np.errstate(invalid="ignore"):
        return (sums[high_N] - sums[low_N]) / (counts[high_N] - counts[low_N])


def thinned(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many points as a chart can show, the least and the greatest of each part among them."""
    if len(y_N) <= 2 * BUCKETS:
        return x_N, y_N
    edges = np.linspace(0, len(y_N), BUCKETS + 1).astype(int)
    kept = {0, len(y_N) - 1}
    for low, high in itertools.pairwise(edges):
        part = y_N[low:high]
        kept |= {low + int(np.where(np.isnan(part), far, part).argmin() if far > 0 else
                           np.where(np.isnan(part), far, part).argmax()) for far in (np.inf, -np.inf)}  # fmt: skip
    places = sorted(kept)
    return x_N[places], y_N[places]
