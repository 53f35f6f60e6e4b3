"""Charts: points that are kept, axes that show what moves, labels that stand apart."""

import itertools
import math
import re

import numpy as np
import pytest

from fasttrain.page.charts import Line, Scale, curves
from fasttrain.page.distributions import ridges
from fasttrain.page.points import BUCKETS, smoothed, thinned
from fasttrain.page.shell import key
from fasttrain.page.style import COLOURS, SERIES, SOLID


def labels(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def test_a_thinned_curve_keeps_its_ends_and_every_spike() -> None:
    y_N = np.sin(np.arange(100_000) / 5000)
    y_N[[31, 77_777]] = 9, -9
    x_N, kept = thinned(np.arange(100_000.0), y_N)
    assert len(kept) <= 2 * BUCKETS + 2
    assert {0.0, 31.0, 77_777.0, 99_999.0} <= set(x_N)
    assert (kept.max(), kept.min()) == (9, -9)


def test_gaps_stay_gaps() -> None:
    y_N = np.ones(10_000)
    y_N[4000:6000] = np.nan
    x_N, kept = thinned(np.arange(10_000.0), y_N)
    assert np.isnan(kept[(x_N > 4100) & (x_N < 5900)]).all()
    assert np.isfinite(smoothed(y_N)[:3900]).all()


def test_a_mean_over_the_values_around_keeps_a_level_and_ends_near_the_last_values() -> None:
    assert np.allclose(smoothed(np.full(500, 3.0)), 3.0)
    assert smoothed(np.arange(500.0))[-1] > 485


def test_an_axis_shows_what_moves() -> None:
    high = curves([Line("", [1, 2, 3], [7.0, 7.2, 7.1])], "loss")
    assert labels(high)[-1] == "7.100"
    assert "0" not in labels(high)[:-1]
    assert any(re.fullmatch(r"7\.\d+", label) for label in labels(high)[:-1])
    assert "0" in labels(curves([Line("", [1, 2, 3], [0.0, 70.0, 80.0])], "accuracy"))


def test_a_curve_of_one_value_shows_it() -> None:
    """A run of fewer steps than --log-every has no other."""
    assert "<use" in curves([Line("", [8], [5.2])], "loss")
    assert "<use" not in curves([Line("", [8, 16], [5.2, 5.1])], "loss")


@pytest.mark.parametrize("values", [[], [math.nan], [math.nan, math.inf], [0.0, 0.0], [-1e300, 1e300], [5e-8, 4e-8]])
def test_any_values_are_drawn(values: list[float]) -> None:
    drawn = curves([Line("", list(range(len(values))), values)], "odd", Scale(lambda s: s, lambda s: s))
    assert drawn.startswith("<svg")


def test_names_at_the_ends_stand_apart_in_the_order_of_their_values() -> None:
    lines = [Line(f"run{n}", [1, 2], [0.0, 1 + n / 1000], SERIES[n]) for n in (2, 0, 1)]
    found = re.findall(r'y="([\d.]+)"[^>]*>run(\d)', curves([*lines, Line("low", [1, 2], [0, 0])], "runs"))
    heights = {int(n): float(y) for y, n in found}
    assert heights[0] - heights[1] >= 12
    assert heights[1] - heights[2] >= 12


def test_colours_are_the_pages_and_no_id_is_left_but_those_that_are_referred_to() -> None:
    drawn = curves([Line("", [1, 2], [3.0, 4.0], points=True)], "a chart", None, [(3.5, "level")], [(1.5, "event")])
    assert "var(--c1)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'(?:href|url\()[="(]*#\w+', "", drawn))
    assert all(f"#{name}" in drawn for name in re.findall(r'\bid="([^"]+)"', drawn))
    assert {"level 3.50", "event"} <= set(labels(drawn))
    assert 'aria-label="a chart: from 3.00 to 4.00; level 3.5"' in drawn


def test_a_strangers_words_are_no_markup() -> None:
    drawn = curves([Line("<b>", [1, 2], [3.0, 4.0]), Line("$x_1$", [1, 2], [1.0, 2.0])], 'a "<chart>"')
    assert "<b>" not in drawn
    assert "<chart>" not in drawn
    assert "$x_1$ 2.00" in labels(drawn)


def test_distributions_are_drawn_in_a_row_for_each_step() -> None:
    counts = [0] * 30 + [5, 9, 5] + [0] * 31
    drawn = ridges([("100", [counts, counts]), ("200", [counts, [0] * 64])], SERIES[:2], "scores")
    assert {"100", "200"} <= set(labels(drawn))
    assert drawn.count("fill-opacity") == 4


def test_a_large_value_at_a_curves_end_has_few_decimals() -> None:
    assert labels(curves([Line("", [1, 2], [805.0, 801.0])], "images/s"))[-1] == "801.0"


def test_values_that_hardly_move_have_ticks_that_differ() -> None:
    """A learning rate early in its cosine."""
    drawn = labels(curves([Line("", [1, 30, 60], [0.0075, 0.007494, 0.0074836])], "lr"))
    ticks = [label for label in drawn if label.startswith("0.007")]
    assert len(set(ticks)) == len(ticks) >= 3
    assert ticks[-1].startswith("0.00748")


def test_scores_that_are_all_alike_look_it() -> None:
    drawn = ridges([("0", [[0] * 63 + [9], [0] * 63 + [9]])], SERIES[:2], "scores")
    ticks = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels(drawn) if "." in label]
    assert max(ticks) - min(ticks) >= 0.3


def test_every_colour_has_a_value_of_its_own_in_both_schemes() -> None:
    for scheme in (0, 1):
        values = [pair[scheme] for pair in COLOURS.values()]
        assert len(set(values)) == len(values)


# Linear RGB as those without one kind of cone see it: Machado et al. 2009 (doi 10.1109/TVCG.2009.113), severity 1.
VISIONS = {
    "all": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "deuteranopia": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.969]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def seen(colour: str, vision: str) -> np.ndarray:
    """As L*, a*, b*."""
    value_3 = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear_3 = np.where(value_3 <= 0.04045, value_3 / 12.92, ((value_3 + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x_3 = xyz @ np.clip(np.asarray(VISIONS[vision]) @ linear_3, 0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(x_3 > 0.008856, np.cbrt(x_3), 7.787 * x_3 + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_curves_of_one_dash_are_told_apart_with_any_colour_vision(scheme: int, vision: str) -> None:
    colours = [COLOURS[f"c{n}"][scheme] for n in range(1, len(SERIES) + 1)]
    for group in (colours[:SOLID], colours[SOLID:]):
        for a, b in itertools.combinations(group, 2):
            assert np.linalg.norm(seen(a, vision) - seen(b, vision)) > 20, (a, b)


def test_curves_and_keys_beyond_the_solid_colours_are_dashed() -> None:
    for colour in SERIES:
        drawn = curves([Line("", [1, 2], [3.0, 4.0], colour)], "a chart")
        dashed = colour in SERIES[SOLID:]
        assert ("stroke-dasharray" in drawn) == ("dashed" in key("name", colour)) == dashed
