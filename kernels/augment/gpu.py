"""The augmentation on a GPU, by Triton kernels. Nothing in it waits for the GPU, and results do not vary between runs.

For each size of views four launches over tiles of TILE × TILE pixels, whatever the images' sizes; loops run over what
the table says, inside the kernels (gpu_kernels.py):

1. `resize_kernel` crops and resizes from the bytes, does the colour operations before contrast, and sums the gray of
   its tile, each tile into a place of its own (no atomics: the mean is the same in every run);
2. `contrast_kernel` takes the mean gray and does contrast and what follows it;
3. and 4. `blur_columns_kernel` and `blur_rows_kernel` are the two passes of the Gaussian blur.

The kernel that does a view's last operation also solarises, normalises and writes it; the later ones pass over it.
Between kernels pixels lie in planes in a scratch, as float16 where the output has 16 bits (values are in 0…1, so the
error is a sixteenth of a byte's step at most), else float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from fasttrain.kernels.augment.gpu_kernels import (
    WORDS,
    blur_columns_kernel,
    blur_rows_kernel,
    contrast_kernel,
    resize_kernel,
)

if TYPE_CHECKING:
    from fasttrain.kernels.augment import Groups
    from fasttrain.kernels.augment.table import ViewTable

INTERPRETED = triton.knobs.runtime.interpret  # the kernels below then run on the CPU, in numpy, for tests

TILE = 32  # divides the customary sizes 224, 96, 64 and 32
_CONTRAST = 1  # as numbered in a ViewTable


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    mean: Tensor,
    std: Tensor,
    groups: Groups,
) -> None:
    """Writes the normalised views. Arguments as for `kernels.augment.augment`, already checked, and its groups.

    A table on the CPU is packed into pinned memory and copied without waiting; kernels that none of its views needs are
    left out. A table on the device is packed there, and nothing is read back.
    """
    on_host = table.crop_BV4.device.type == "cpu"
    if pixels.is_cuda and on_host and torch.cuda.is_current_stream_capturing():
        raise ValueError("a CUDA graph would replay one table: put the table, offsets and sizes on the device first")
    contrast = not on_host or bool((table.order_BV4 == _CONTRAST).any())
    blur = not on_host or bool((table.sigma_BV > 0).any())
    scale = tuple(mean.tolist()), tuple((1 / std).tolist())
    with torch.cuda.device_of(pixels):
        rows = _rows(offset_B, width_B, table, [numbers for numbers, _ in groups], pixels.is_cuda)
        rows = rows.to(pixels.device, non_blocking=True)
        parts = rows.split([out_VBSS3.shape[:2].numel() for _, out_VBSS3 in groups])
        for part, (_, out_VBSS3) in zip(parts, groups, strict=True):
            _launch(pixels, part, scale, contrast, blur, out_VBSS3)


def _launch(
    pixels: Tensor, rows: Tensor, scale: tuple[tuple[float, ...], ...], contrast: bool, blur: bool, out_VBSS3: Tensor
) -> None:
    """Makes the views of one size."""
    views, images, size = out_VBSS3.shape[:3]
    dtype = torch.float32 if out_VBSS3.dtype == torch.float32 else torch.float16
    tiles = triton.cdiv(size, TILE) ** 2
    grid = (images * views * tiles,)
    plane_sizes = (images * views if contrast or blur else 0, 3, size, size)
    planes = _scratch(plane_sizes, dtype, pixels.device)
    sums = _scratch((images * views if contrast else 0, tiles), torch.float32, pixels.device)
    last = (out_VBSS3, images, views, *scale, size, TILE)
    resize_kernel[grid](pixels, rows, planes, sums, *last)
    if contrast:
        contrast_kernel[grid](rows, planes, sums, triton.next_power_of_2(tiles), *last)
    if blur:
        blurred = _scratch(plane_sizes, dtype, pixels.device)
        blur_columns_kernel[grid](rows, planes, blurred, size, triton.next_power_of_2(size), TILE)
        blur_rows_kernel[grid](rows, blurred, triton.next_power_of_2(size), *last)


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _rows(offset_B: Tensor, width_B: Tensor, table: ViewTable, groups: list[list[int]], pinned: bool) -> Tensor:
    """The table as (B · V, 16) int32, where the table lies: group after group of views, in each image after image.

    Words: first byte of the crop (two words), bytes of an image's row, height and width of the crop, flags, radius and
    sigma of the blur, the four operations, their four strengths; floats as their bits.
    """
    top, left, height, width = table.crop_BV4.unbind(-1)
    stride_B1 = 3 * width_B[:, None]
    images, views = table.flip_BV.shape
    rows = torch.empty((images, views, WORDS.value), dtype=torch.int32, device=top.device)
    first_BV = offset_B[:, None] + top * stride_B1.long() + 3 * left
    rows[..., :2] = first_BV[..., None].view(torch.int32)
    rows[..., 2], rows[..., 3], rows[..., 4] = stride_B1, height, width
    rows[..., 5] = table.flip_BV + 2 * table.gray_BV + 4 * table.solarize_BV
    rows[..., 6] = torch.ceil(3 * table.sigma_BV.double())
    rows[..., 7] = table.sigma_BV.view(torch.int32)
    rows[..., 8:12] = table.order_BV4
    rows[..., 12:] = table.strength_BV4.view(torch.int32)
    # Stacked, not indexed by a list: on a GPU that would copy the list there, and wait.
    parts = [torch.stack([rows[:, v] for v in numbers], 1).flatten(0, 1) for numbers in groups]
    pin = pinned and top.is_cpu
    return torch.cat(parts, out=torch.empty_like(rows.flatten(0, 1), pin_memory=pin))
