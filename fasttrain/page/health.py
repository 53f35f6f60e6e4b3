"""Health of the representation: figures that need no labels, and what each should be."""

from __future__ import annotations

import numpy as np

from fasttrain.page.charts import Line
from fasttrain.page.history import History
from fasttrain.page.over_steps import over_steps
from fasttrain.page.shell import charts, section
from fasttrain.page.style import SERIES

# events: names of a chart's curves, its title, what is good and bad
HEALTH: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("rankme", "effective_rank"), "Rank of the features",
     "How many dimensions are in use: higher is better, a fall to a few is a collapse."),
    (("std", "feature_std"), "Standard deviation of a dimension",
     "Of vectors of length 1, times √width: 1 when they are spread evenly, 0 when all images look the same."),
    (("projection_std",), "Standard deviation of the projections",
     "As they are: the loss asks for 1."),
    (("alignment",), "Alignment",
     "Distance between two views of an image: lower is better, as long as uniformity is low, too."),
    (("uniformity",), "Uniformity",
     "How evenly features lie on the sphere: lower is better, 0 is one point."),
    (("alpha_req",), "α-ReQ",
     "How fast the spectrum decays: near 1 is good; well above, few directions hold all; well below, noise does."),
    (("lidar",), "LiDAR rank",
     "Dimensions that tell images apart whatever the view: higher is better."),
    (("compactness", "compactness_low"), "Compactness",
     "How much nearer an image's worst view is than the mean of other images: near 1 is good, below 0 confused."),
)  # fmt: skip
NAMES = {"rankme": "RankMe", "effective_rank": "effective", "std": "projections", "feature_std": "features",
         "compactness": "mean", "compactness_low": "5 % quantile"}  # fmt: skip
ALIKE = 0.01  # of its values: a curve no further from another one looks the same
VARIANCE = "variance_weight"  # the option of losses that look at projection_std


def health(history: History) -> str:
    """The section; "" where nothing was measured."""
    figures = []
    for names, title, caption in HEALTH:
        asked = names != ("projection_std",) or VARIANCE in history.config
        columns = [(name, *history.column(name, events=True)) for name in names if asked]
        lines = [
            Line(NAMES.get(name, ""), steps, values, colour, points=len(steps) < 30)
            for (name, steps, values), colour in zip(columns, SERIES, strict=False)
            if np.isfinite(values).any()
        ]
        if lines:
            shown = [line for place, line in enumerate(lines) if not any(alike(line, other) for other in lines[:place])]
            if twins := [line.name for line in lines if line not in shown]:
                caption += f" Left out: {', '.join(twins)}, the same as {shown[0].name} within 1 %."
            figures.append(over_steps(history, title, shown, caption))
    note = "Of a fixed set of images, without labels: what tells a collapse before an accuracy does."
    return section("Health of the representation", charts(figures), note=note)


def alike(line: Line, other: Line) -> bool:
    """Can no chart tell the two apart?"""
    a_N, b_N = np.asarray(line.y_N), np.asarray(other.y_N)
    return len(a_N) == len(b_N) and bool(np.allclose(a_N, b_N, rtol=ALIKE, atol=0, equal_nan=True))
