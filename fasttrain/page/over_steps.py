"""A figure of a run's values over its steps: a chart, or, of what was measured once, its value in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fasttrain.page.charts import Line, curves
from fasttrain.page.history import History
from fasttrain.page.numbers import short
from fasttrain.page.shell import figure, key, text


def over_steps(
    history: History, title: str, lines: Sequence[Line], caption: str = "", most: float = math.inf,
    references: Sequence[tuple[float, str]] = (),
) -> str:  # fmt: skip
    """caption: words below the title. The rest is as in `curves`."""
    if all(sum(map(math.isfinite, line.y_N)) < 2 for line in lines):
        return _told(title, lines, caption)
    keys = "".join(key(line.name, line.colour) for line in lines) + "<br>" if len(lines) > 1 else ""
    drawn = curves(lines, f"{title} over steps", history.scale(), references, history.marks(), most)
    return figure(title, drawn, keys + text(caption))


def _told(title: str, lines: Sequence[Line], caption: str) -> str:
    """A point is no curve."""
    said = [
        f"<div>{text(line.name)} <b>{short(y)}</b> <small>at step {step:,.0f}</small></div>"
        for line in lines for step, y in zip(line.x_N, line.y_N, strict=True) if math.isfinite(y)
    ]  # fmt: skip
    return figure(title, f"<div class=once>{''.join(said) or 'not finite'}</div>", text(caption))
