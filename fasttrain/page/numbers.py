"""Numbers as they stand in charts and words: few digits, and those that tell something."""

from __future__ import annotations

import math
from collections.abc import Sequence

HUGE = 1e12  # numbers that only powers of ten can tell
SIZES = (1e9, "G"), (1e6, "M"), (1e3, "k")


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick's label, with as many digits as tell it from its neighbours."""
    if (most := max(map(abs, ticks), default=0.0)) >= HUGE:
        return f"{value:.1e}"
    size, letter = next((s for s in SIZES if most >= max(s[0], 10_000)), (1.0, ""))
    apart = abs(ticks[1] - ticks[0]) / size if len(ticks) > 1 else abs(value) / size
    places = max(0, -math.floor(math.log10(apart) + 1e-9)) if apart else 0
    places += apart * 10**places % 1 > 0.01  # 2.5 apart
    return f"{value / size:,.{places}f}{letter}" if places <= 8 else f"{value:.{_digits(value, apart)}g}"


def count(value: float) -> str:
    """A number in few characters."""
    if abs(value) >= HUGE:
        return f"{value:.1e}"
    for size, letter in SIZES:
        if abs(value) >= max(size, 10_000):
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def short(value: float) -> str:
    """A value to be read: about three digits."""
    return count(value) if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def ended(value: float, span: float) -> str:
    """A value on an axis of such a span, to about a hundredth of it."""
    places = math.floor(math.log10(span)) if span > 0 else 0
    if value == 0 or abs(value) >= 10_000:
        return count(value)
    if places < -4:
        return f"{value:.{_digits(value, span) + 1}g}"
    return f"{value:,.{max(0, (1 if abs(value) >= 100 else 2) - places)}f}"


def _digits(value: float, apart: float) -> int:
    """How many tell a value from others that are so far from it."""
    return max(2, min(15, math.ceil(math.log10(abs(value) / apart)) + 1)) if value and apart else 2
