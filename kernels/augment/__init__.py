"""Applies a table of view parameters to a ragged batch of whole images: crops, colours and normalised output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasttrain.kernels.augment.table import ViewTable

Views = tuple[Tensor, ...]
"""The views of a batch, one tensor for each size: (V, B, 3, S, S), the V views of B images of that side S. Memory is
(V, B, S, S, 3), so group[v] and group.flatten(0, 1) are channels-last batches without a copy."""

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Groups = list[tuple[list[int], Tensor]]
"""For each size, the numbers of its views and the memory (V, B, S, S, 3) that they are written to."""

_CONTRAST = 1  # as numbered in a ViewTable


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    sizes: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
    out: Views | None = None,
) -> Views:
    """Makes every view of every image of a batch.

    pixels: (bytes,) uint8, the images' RGB bytes, each image packed height × width × 3 row by row; offset_B: (B,)
    int64, each image's first byte; height_B, width_B: (B,) int32; table: what to do, for B images and V views; sizes:
    the side in pixels of each of the V views; mean, std: three numbers each, for values in 0…1.

    Per view, in this order (torchvision.transforms.v2.functional's functions on float images in 0…1, no rounding to
    bytes in between): crop and resize (bilinear, antialiased, align_corners=False), horizontal flip, the colour
    operations in the table's order, contrast once at most (adjust_brightness, adjust_contrast, adjust_saturation,
    adjust_hue), rgb_to_grayscale with three channels, gaussian_blur (reflect padding, radius ceil(3 sigma)), solarize
    at 0.5, (x − mean) / std.

    impl: "reference" is plain torch on any device; "cpu" is compiled and takes CPU tensors; "triton" takes CUDA
    tensors; "auto" is "triton" for CUDA tensors, "cpu" for CPU tensors and "reference" for others. out: the result of
    an earlier call with the same B, sizes and dtype, to be overwritten: fresh memory for a large batch costs about as
    much as the views.

    Table, offsets and sizes of images lie together on the CPU, whatever the pixels' device, or on the pixels' device.
    "triton" never waits for the GPU: from the CPU they are copied in one pinned piece; on the device a call may
    be captured in a CUDA graph (once it has run outside one, which compiles its kernels).

    Returns float32, bfloat16 or float16, as `dtype` says: a tensor for each different side in the order in which the
    sides first appear, holding the views of that side in their order. Sizes (224, 224, 96, 96, 96) give two tensors,
    (2, B, 3, 224, 224) and (3, B, 3, 96, 96).
    Raises ValueError for an unknown or unavailable impl, another dtype, sizes or an `out` that do not fit, and, where
    the table is on the CPU (a device's is not read back), for images outside pixels, crops outside their image, unknown
    operations, contrast twice, and blurs wider than a view.
    """
    apply = _implementation(impl, pixels.device.type)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if table.crop_BV4.device != offset_B.device:
        raise ValueError(f"the table lies on {table.crop_BV4.device}, offsets and sizes on {offset_B.device}")
    images, views = table.flip_BV.shape
    if len(sizes) != views:
        raise ValueError(f"{len(sizes)} sizes for {views} views")
    if offset_B.device.type == "cpu":
        _check(pixels, offset_B, height_B, width_B, table, torch.tensor(sizes))
    numbers = {side: [v for v, other in enumerate(sizes) if other == side] for side in dict.fromkeys(sizes)}
    shapes = [(len(chosen), images, side, side, 3) for side, chosen in numbers.items()]
    made = _outputs(shapes, dtype, pixels.device, out)
    groups = [(chosen, group.permute(0, 1, 3, 4, 2)) for chosen, group in zip(numbers.values(), made, strict=True)]
    statistics = tuple(torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    apply(pixels, offset_B, height_B, width_B, table, *statistics, groups)
    return made


def _outputs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, out: Views | None) -> Views:
    """The results (V, B, 3, S, S), in memory of the shapes (V, B, S, S, 3): new, or an earlier call's."""
    if out is None:
        return tuple(torch.empty(shape, dtype=dtype, device=device).permute(0, 1, 4, 2, 3) for shape in shapes)
    memory = [group.permute(0, 1, 3, 4, 2) for group in out]
    fits = [m.dtype == dtype and m.device == device and m.is_contiguous() for m in memory]
    if [m.shape for m in memory] != shapes or not all(fits):
        raise ValueError(f"out is not an earlier result in {dtype} for views, images and sides {shapes}")
    return tuple(out)


def _implementation(impl: str, device: str) -> Callable[..., None]:
    """The function behind a name. Imported on demand: numba, torchvision and Triton take a second each to import."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")
    if impl == "reference":
        from fasttrain.kernels.augment import reference

        return reference.augment
    if impl == "triton":
        from fasttrain.kernels.augment import gpu

        if device == "cuda" or (device == "cpu" and gpu.INTERPRETED):
            return gpu.augment
    elif device == "cpu":
        from fasttrain.kernels.augment import cpu

        return cpu.augment
    raise ValueError(f"impl {impl!r} is unavailable for tensors on {device}: choose auto or reference")


def _check(
    pixels: Tensor, offset_B: Tensor, height_B: Tensor, width_B: Tensor, table: ViewTable, size_V: Tensor
) -> None:
    """Raises ValueError where applying the table would read outside an image or a view."""
    bytes_B = height_B.long() * width_B.long() * 3
    outside_B = (offset_B < 0) | (height_B < 1) | (width_B < 1) | (offset_B + bytes_B > pixels.numel())
    _refuse(outside_B, f"does not lie within the {pixels.numel()} bytes of pixels")
    top, left, height, width = table.crop_BV4.long().unbind(-1)
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    inside &= (top + height <= height_B[:, None]) & (left + width <= width_B[:, None])
    _refuse(~inside, "has a crop outside the image")
    _refuse(((table.order_BV4 < -1) | (table.order_BV4 > 3)).any(-1), "names an unknown colour operation")
    _refuse((table.order_BV4 == _CONTRAST).sum(-1) > 1, "names contrast twice")
    radius = torch.ceil(3 * table.sigma_BV.double())
    _refuse(~((table.sigma_BV >= 0) & (radius < size_V)), "has a blur sigma that is negative or too wide for its side")


def _refuse(wrong: Tensor, what: str) -> None:
    """Raises ValueError naming the first marked image, or image and view."""
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        named = ", ".join(f"{name} {i}" for name, i in zip(("image", "view"), place, strict=False))
        raise ValueError(f"{named} {what}")
