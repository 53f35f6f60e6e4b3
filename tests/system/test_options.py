"""Options: how bounds are told, and what those of earlier runs are now."""

import pytest

from fasttrain.system.options import Bounds, named_now


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(1, 1 << 24), "at least 1 and at most 16777216"),
        (Bounds(0, 2**64 - 1), "at least 0 and at most 18446744073709551615"),
        (Bounds(0, 0.99), "at least 0 and at most 0.99"),
        (Bounds(0, low_open=True), "above 0"),
    ],
)
def test_bounds_are_told_as_they_are_typed(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text


def test_dino_dropped_paths_before_that_was_an_option() -> None:
    assert named_now({"method": "dino", "arch": "vit_tiny", "vit_patch": 8}) == {
        "method": "dino", "arch": "vit_tiny", "patch_size": 8, "drop_path": 0.1,
    }  # fmt: skip
    for others in ({"method": "moco", "arch": "vit_tiny"}, {"method": "dino", "arch": "resnet18"}):
        assert named_now(others) == others
    chosen = {"method": "dino", "arch": "vit_tiny", "drop_path": 0.2}
    assert named_now(chosen) == chosen
