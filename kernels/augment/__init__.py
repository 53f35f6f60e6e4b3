"""Applies a table of view parameters to a ragged batch of whole images: crops, colours and normalised output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasttrain.kernels.augment.table import ViewTable

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONTRAST = 1  # as numbered in a ViewTable


@overload
def augment(
    pixels: Tensor, offset_B: Tensor, height_B: Tensor, width_B: Tensor, table: ViewTable, size: int,
    mean: Sequence[float], std: Sequence[float], *,
    impl: str = ..., dtype: torch.dtype = ..., out: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def augment(
    pixels: Tensor, offset_B: Tensor, height_B: Tensor, width_B: Tensor, table: ViewTable, size: Sequence[int],
    mean: Sequence[float], std: Sequence[float], *,
    impl: str = ..., dtype: torch.dtype = ..., out: Sequence[Tensor] | None = ...,
) -> tuple[Tensor, ...]: ...  # fmt: skip


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Makes every view of every image of a batch.

    pixels: (bytes,) uint8, the images' RGB bytes, each image packed height × width × 3 row by row; offset_B: (B,)
    int64, each image's first byte; height_B, width_B: (B,) int32; table: what to do, for B images and V views; size:
    side S of a view in pixels, or one for each view (multi-crop); mean, std: three numbers each, for values in 0…1.

    Per view, in this order (torchvision.transforms.v2.functional's functions on float images in 0…1, no rounding to
    bytes in between): crop and resize (bilinear, antialiased, align_corners=False), horizontal flip, the colour
    operations in the table's order, contrast once at most (adjust_brightness, adjust_contrast, adjust_saturation,
    adjust_hue), rgb_to_grayscale with three channels, gaussian_blur (reflect padding, radius ceil(3 sigma)), solarize
    at 0.5, (x − mean) / std.

    impl: "reference" is plain torch on any device; "cpu" is compiled and takes CPU tensors; "triton" takes CUDA
    tensors; "auto" is "triton" for CUDA tensors, "cpu" for CPU tensors and "reference" for others. out: the result of
    an earlier call with the same B, V, S and dtype, to be overwritten: fresh memory for a large batch costs about as
    much as the views.

    Table, offsets and sizes lie together on the CPU, whatever the pixels' device, or on the pixels' device. "triton"
    never waits for the GPU: from the CPU they are copied in one pinned piece; on the device a call may be captured in
    a CUDA graph (once it has run outside one, which compiles its kernels).

    Returns (B, V, 3, S, S) float32, bfloat16 or float16, as `dtype` says; each [:, v] is a contiguous channels-last
    batch. With a size for each view, a tuple of such tensors, one for each different size in the order in which the
    sizes first appear, holding the views of that size in their order: (224, 224, 96, 96, 96) gives two tensors, of 2
    and of 3 views.
    Raises ValueError for an unknown or unavailable impl, another dtype, and, where the table is on the CPU (a device's
    is not read back), for images outside pixels, crops outside their image, unknown operations, contrast twice, and
    blurs wider than a view.
    """
    apply = _implementation(impl, pixels.device.type)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if table.crop_BV4.device != offset_B.device:
        raise ValueError(f"the table lies on {table.crop_BV4.device}, offsets and sizes on {offset_B.device}")
    statistics = tuple(torch.tensor(values, dtype=torch.float32) for values in (mean, std))

    def make(table: ViewTable, size: int, out: Tensor | None) -> Tensor:
        if offset_B.device.type == "cpu":
            _check(pixels, offset_B, height_B, width_B, table, size)
        out_VBSS3 = _output(table, size, dtype, pixels.device, out)
        apply(pixels, offset_B, height_B, width_B, table, *statistics, out_VBSS3)
        return out_VBSS3.permute(1, 0, 4, 2, 3)

    if isinstance(size, int):
        assert out is None or isinstance(out, Tensor)
        return make(table, size, out)
    groups = _groups(table, size)
    if out is not None and (isinstance(out, Tensor) or len(out) != len(groups)):
        raise ValueError(f"out is not an earlier result for sizes {tuple(size)}: one tensor for each different size")
    return tuple(make(part, side, out[i] if out else None) for i, (side, part) in enumerate(groups.items()))


def _groups(table: ViewTable, sizes: Sequence[int]) -> dict[int, ViewTable]:
    """The different sizes in the order in which they first appear, each with its views' part of the table."""
    views = table.flip_BV.shape[1]
    if len(sizes) != views:
        raise ValueError(f"{len(sizes)} sizes for {views} views")
    groups = {}
    for side in dict.fromkeys(sizes):
        chosen = [v for v in range(views) if sizes[v] == side]
        parts = {name: torch.stack([column[:, v] for v in chosen], 1) for name, column in vars(table).items()}
        groups[side] = replace(table, **parts)
    return groups


def _output(table: ViewTable, size: int, dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    """The memory of the result (V, B, S, S, 3): new, or an earlier result's."""
    images, views = table.flip_BV.shape
    shape = (views, images, size, size, 3)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    out_VBSS3 = out.permute(1, 0, 3, 4, 2)
    if out_VBSS3.shape != shape or out.dtype != dtype or out.device != device or not out_VBSS3.is_contiguous():
        raise ValueError(f"out is not an earlier result for {images} images, {views} views, size {size} and {dtype}")
    return out_VBSS3


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
    _refuse((table.order_BV4 == _CONTRAST).sum(-1) > 1, "names contrast twice")
    radius = torch.ceil(3 * table.sigma_BV.double())
    _refuse(~((table.sigma_BV >= 0) & (radius < size)), f"has a blur sigma that is negative or too wide for {size} px")


def _refuse(wrong: Tensor, what: str) -> None:
    """Raises ValueError naming the first marked image, or image and view."""
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        named = ", ".join(f"{name} {i}" for name, i in zip(("image", "view"), place, strict=False))
        raise ValueError(f"{named} {what}")
