"""The parameters of views, drawn elsewhere: what is cut from each image, and how its colours change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the colour operations, as numbered in a ViewTable


@dataclass(frozen=True)
class ViewTable:
    """The drawn parameters of B images' V views, as tensors, all on the CPU or all on the device."""

    crop_BV4: Tensor  # int32: top, left, height, width, in pixels of the source image
    flip_BV: Tensor  # bool: mirrored left to right
    order_BV4: Tensor  # int8: colour operations in the order applied (0…3 as above), -1 where none is
    strength_BV4: Tensor  # float32, by operation: three factors (1 = unchanged) and the hue's turn in -0.5…0.5
    gray_BV: Tensor  # bool: gray after the colour operations (a saturation of 0 among them makes gray there)
    sigma_BV: Tensor  # float32: Gaussian blur in pixels of the output, 0 = none
    solarize_BV: Tensor  # bool: values of at least 0.5 become one minus themselves
