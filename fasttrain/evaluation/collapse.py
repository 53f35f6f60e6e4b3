"""Has a representation collapsed? What figures of its health say, in a line, with what to try."""

from __future__ import annotations

from fasttrain.evaluation.health import Figures
from fasttrain.system.options import Options


def collapse(figures: Figures, options: Options) -> str:
    """A line with the figure that tells it and what to try, "" for none. options: the method's own."""
    return ""
