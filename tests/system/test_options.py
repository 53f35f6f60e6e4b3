"""Options: how bounds are told."""

import pytest

from fasttrain.system.options import Bounds


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(1, 1 << 24), "at least 1 and at most 16777216"),
        (Bounds(0, 2**64 - 1), "at least 0 and at most 18446744073709551615"),
        (Bounds(0, 0.99), "at least 0 and at most 0.99"),
        (Bounds(0, low_open=True), "above 0"),
        (Bounds(low_open=True), "finite"),
    ],
)
def test_bounds_are_told_as_they_are_typed(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text
