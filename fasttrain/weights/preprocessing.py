"""How images are prepared for an encoder, in words that travel beside its weights."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preprocessing(NamedTuple):
    """How an image becomes an encoder's input: its central square of `crop` times the shorter side, resized to
    size × size with bilinear interpolation and antialiasing, in [0, 1], minus mean, divided by std, R, G, B."""

    size: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, with what is the same for every encoder."""
        fixed = {
            "interpolation": "bilinear",
            "antialias": True,
            "crop_mode": "center",
            "channels": "RGB",
            "range": [0, 1],
        }
        return {**self._asdict(), **fixed}
