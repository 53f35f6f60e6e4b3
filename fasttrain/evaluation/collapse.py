"""Has a representation collapsed? What figures of its health say, in a line, with what to try.

The limits lie between runs that had collapsed and healthy ones of all methods (docs/log.md). Uniformity by itself does
not tell them apart: projections without batch norm lie close together for long in healthy runs, too.
"""

from __future__ import annotations

from collections.abc import Callable

from fasttrain.evaluation.health import Figures
from fasttrain.system.errors import RunError
from fasttrain.system.options import Options, flat

# Until then healthy networks in evaluation mode look as if they had collapsed: a part of the run, and steps, in which
# running statistics of batch norm come to those of weights that still move fast.
YOUNG, YOUNG_STEPS = 0.1, 50
ONE_POINT, NARROW = -0.15, 0.42  # uniformity of projections and feature_std, of which both have to be nearer to 0
ONE_DIRECTION = 2.0  # RankMe
SHRUNK = 0.05  # projection_std, where the loss asks for 1
REMEDIES = {
    "variance_weight": "a higher --variance-weight",
    "redundancy_weight": "a higher --redundancy-weight",
    "ema": "an --ema nearer to 1",
    "teacher_temperature": "a lower --teacher-temperature",
    "predictor_hidden": "a wider --predictor-hidden",
}  # by the option of methods that have it

LOOKED_AT = {"uniformity", "feature_std", "std", "rankme", "projection_std"}


class Alarm:
    """Says that a representation has collapsed: once, until it has recovered."""

    def __init__(self, options: Options, young: int, stops: bool, say: Callable[[str], None]) -> None:
        """options: the method's own. young: steps until a collapse may be found. stops: it ends the run, whose error
        then says it. say: shows a line."""
        self._options, self._young, self._stops, self._say = options, young, stops, say
        self.line = ""  # of a collapse that has not recovered

    def __call__(self, step: int, figures: Figures) -> bool:
        """Has it collapsed, and does that end the run?"""
        line = collapse(figures, self._options) if step >= self._young else ""
        if line and not self.line and not self._stops:
            self._say(line)
        self.line = line
        return self.error is not None

    @property
    def error(self) -> RunError | None:
        """What ends the run."""
        return RunError(f"{self.line} (--stop-on-collapse)") if self._stops and self.line else None

    def refuse(self) -> None:
        """Raise it where there is one."""
        if error := self.error:
            raise error


def collapse(figures: Figures, options: Options) -> str:
    """A line with the figure that tells it and what to try, "" for none.

    figures: of HealthMonitor; LOOKED_AT are. options: the method's own.
    """
    value = {name: float(figures[name]) for name in LOOKED_AT}  # type: ignore[arg-type]
    own = flat(options)
    # Written so that a figure that is no number is a collapse, too.
    if not (value["uniformity"] < ONE_POINT or value["feature_std"] > NARROW):
        found = (
            f"projections of different images are nearly one (uniformity {value['uniformity']:.3f}, where 0 is a "
            f"single point and -4 an even spread; std {value['std']:.3f} of 1)"
        )
    elif not value["rankme"] > ONE_DIRECTION:
        found = f"the encoder's features lie along one direction (RankMe {value['rankme']:.2f})"
    elif "variance_weight" in own and not value["projection_std"] > SHRUNK:
        found = f"the projections have shrunk to a standard deviation of {value['projection_std']:.3f} of 1"
    else:
        return ""
    more = "".join(f", {remedy}" for option, remedy in REMEDIES.items() if option in own)
    return f"collapse: {found}; try a lower --lr, a longer --warmup-epochs{more}"
