"""Applies a table of view parameters to a ragged batch of whole images: crops, colours and normalised output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasttrain.views import ViewTable

IMPLEMENTATIONS = ("auto", "reference", "cpu")


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    impl: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Makes every view of every image of a batch.

    pixels: (bytes,) uint8, the images' RGB bytes, each image packed height × width × 3 row by row; offset_B: (B,)
    int64, each image's first byte; height_B, width_B: (B,) int32; table: what to do, for B images and V views; size:
    side S of a view in pixels; mean, std: three numbers each, for values in 0…1.

    Per view, in this order (torchvision.transforms.v2.functional's functions on float images in 0…1, no rounding to
    bytes in between): crop and resize (bilinear, antialiased, align_corners=False), horizontal flip, the colour
    operations in the table's order (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue),
    rgb_to_grayscale with three channels, gaussian_blur (reflect padding, radius ceil(3 sigma)), solarize at 0.5,
    (x − mean) / std.

    impl: "reference" is plain torch on any device; "cpu" is compiled and takes CPU tensors; "auto" is "cpu" for CPU
    tensors and "reference" for others. out: the result of an earlier call with the same B, V and S, to be overwritten:
    fresh memory for a large batch costs about as much as the views.

    Returns (B, V, 3, S, S) float32; each [:, v] is a contiguous channels-last batch.
    Raises ValueError for an unknown or unavailable impl and, on CPU tensors (a device's are not read back), for images
    outside pixels, crops outside their image, unknown operations, and blurs wider than a view.
    """
    apply = _implementation(impl, pixels.device.type)
    images, views = table.flip_BV.shape
    if pixels.device.type == "cpu":
        _check(pixels, offset_B, height_B, width_B, table, size)
    shape = (views, images, size, size, 3)
    if out is None:
        out_VBSS3 = torch.empty(shape, dtype=torch.float32, device=pixels.device)
    else:
        out_VBSS3 = out.permute(1, 0, 3, 4, 2)
        if out_VBSS3.shape != shape or out.dtype != torch.float32 or not out_VBSS3.is_contiguous():
            raise ValueError(f"out is not an earlier result for {images} images, {views} views and size {size}")
    mean_3, std_3 = (torch.tensor(values, dtype=torch.float32, device=pixels.device) for values in (mean, std))
    apply(pixels, offset_B, height_B, width_B, table, mean_3, std_3, out_VBSS3)
    return out_VBSS3.permute(1, 0, 4, 2, 3)


def _implementation(impl: str, device: str) -> Callable[..., None]:
    """The function behind a name. Imported on demand: numba and torchvision take a second each to import."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "cpu" and device != "cpu":
        raise ValueError(f"impl 'cpu' is unavailable for tensors on {device}: choose auto or reference")
    if impl == "reference" or device != "cpu":
        from kernels.augment import reference

        return reference.augment
    from kernels.augment import cpu

    return cpu.augment


def _check(pixels: Tensor, offset_B: Tensor, height_B: Tensor, width_B: Tensor, table: ViewTable, size: int) -> None:
    """Raises ValueError where applying the table would read outside an image or a view."""
    bytes_B = height_B.long() * width_B.long() * 3
    outside_B = (offset_B < 0) | (height_B < 1) | (width_B < 1) | (offset_B + bytes_B > pixels.numel())
    _refuse(outside_B, f"does not lie within the {pixels.numel()} bytes of pixels")
    top, left, height, width = table.crop_BV4.long().unbind(-1)
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    inside &= (top + height <= height_B[:, None]) & (left + width <= width_B[:, None])
    _refuse(~inside, "has a crop outside the image")
    _refuse(((table.order_BV4 < -1) | (table.order_BV4 > 3)).any(-1), "names an unknown colour operation")
    radius = torch.ceil(3 * table.sigma_BV.double())
    _refuse(~((table.sigma_BV >= 0) & (radius < size)), f"has a blur sigma that is negative or too wide for {size} px")


def _refuse(wrong: Tensor, what: str) -> None:
    """Raises ValueError naming the first marked image, or image and view."""
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        named = ", ".join(f"{name} {i}" for name, i in zip(("image", "view"), place, strict=False))
        raise ValueError(f"{named} {what}")
