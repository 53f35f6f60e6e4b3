"""Has a representation collapsed? What figures of its health say, in a line, with what to try.

The limits lie between runs that had collapsed and healthy ones of all methods (docs/log.md). Uniformity by itself does
not tell them apart: projections without batch norm lie close together for long in healthy runs, too.
"""

from __future__ import annotations

from fasttrain.evaluation.health import Figures
from fasttrain.system.options import Options, flat

YOUNG = 0.1  # of a run: until then networks in evaluation mode look as if they had collapsed
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


def collapse(figures: Figures, options: Options) -> str:
    """A line with the figure that tells it and what to try, "" for none.

    figures: of HealthMonitor. options: the method's own.
    """
    value = {name: float(figure) for name, figure in figures.items() if not isinstance(figure, list)}
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
