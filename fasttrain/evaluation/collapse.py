"""Has a representation collapsed? What figures of its health say, in a line, with what to try.

The limits lie between runs that had collapsed and healthy ones of all methods (docs/log.md). No figure by itself tells
them apart: projections without batch norm lie close together for long in healthy runs, too.
"""

from __future__ import annotations

from fasttrain.evaluation.health import Figures
from fasttrain.system.options import Options, flat

YOUNG = 0.1  # of a run: until then networks in evaluation mode look as if they had collapsed
ONE_POINT, NARROW = -0.15, 0.42  # uniformity of projections and feature_std, of which both have to be nearer to 0
LOST = 0.25  # of the untrained encoder's RankMe
REMEDIES = {
    "variance_weight": "a higher --variance-weight",
    "redundancy_weight": "a higher --redundancy-weight",
    "ema": "an --ema nearer to 1",
    "teacher_temperature": "a lower --teacher-temperature",
    "predictor_hidden": "a wider --predictor-hidden",
}  # by the option of methods that have it


def collapse(figures: Figures, untrained: Figures, options: Options) -> str:
    """A line with the figure that tells it and what to try, "" for none.

    figures, untrained: of HealthMonitor; the latter of the run's first step, or none. options: the method's own.
    """
    number = {name: float(value) for name, value in figures.items() if not isinstance(value, list)}
    before = untrained.get("rankme", 0.0)
    assert not isinstance(before, list)
    # Written so that a figure that is no number is a collapse, too.
    if not (number["uniformity"] < ONE_POINT or number["feature_std"] > NARROW):
        found = (
            f"projections of different images are nearly one (uniformity {number['uniformity']:.3f}, where 0 is a "
            f"single point and -4 an even spread; std {number['std']:.3f} of 1)"
        )
    elif not number["rankme"] >= LOST * before:
        found = f"the encoder's features have a RankMe of {number['rankme']:.1f}, and had {before:.1f} untrained"
    else:
        return ""
    own = [remedy for option, remedy in REMEDIES.items() if option in flat(options)]
    return f"collapse: {found}; try a lower --lr, a longer --warmup-epochs{''.join(f', {remedy}' for remedy in own)}"
