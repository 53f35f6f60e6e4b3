"""The augmentation in plain torch, one view at a time: the definition that the fast versions are held to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

if TYPE_CHECKING:
    from fasttrain.kernels.augment import Groups
    from fasttrain.kernels.augment.table import ViewTable

_COLOUR = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)


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
    """Writes the normalised views. Arguments as for `kernels.augment.augment`, already checked, and its groups."""
    mean_311, std_311 = (values.to(pixels.device)[:, None, None] for values in (mean, std))
    for b in range(len(offset_B)):
        offset, height, width = int(offset_B[b]), int(height_B[b]), int(width_B[b])
        image = pixels[offset : offset + height * width * 3].view(height, width, 3).permute(2, 0, 1).float() / 255
        for numbers, out_VBSS3 in groups:
            for v, out_BSS3 in zip(numbers, out_VBSS3, strict=True):
                view = (_view(image, table, b, v, out_BSS3.shape[1]) - mean_311) / std_311
                out_BSS3[b] = view.permute(1, 2, 0)


def _view(image: Tensor, table: ViewTable, b: int, v: int, size: int) -> Tensor:
    """One view (3, size, size) in 0…1 of image (3, height, width) in 0…1."""
    top, left, height, width = table.crop_BV4[b, v].tolist()
    view = T.crop(image, top, left, height, width)
    view = F.interpolate(view[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    if table.flip_BV[b, v]:
        view = T.horizontal_flip(view)
    for operation in table.order_BV4[b, v].tolist():
        if operation >= 0:
            view = _COLOUR[operation](view, float(table.strength_BV4[b, v, operation]))
    if table.gray_BV[b, v]:
        view = T.rgb_to_grayscale(view, num_output_channels=3)
    sigma = float(table.sigma_BV[b, v])
    if sigma > 0:
        view = T.gaussian_blur(view, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])
    return T.solarize(view, 0.5) if table.solarize_BV[b, v] else view
