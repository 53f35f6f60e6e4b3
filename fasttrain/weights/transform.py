"""The central view that encoders are evaluated on, of a single image: as a transform of torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2

from fasttrain.formats.image import to_rgb


def central_transform(size: int, crop: float, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """A transform of a Pillow image of any mode, or of a tensor (…, 3, H, W), uint8 or float in 0…1, to its central
    view, (…, 3, size, size) float32: that of `central_views` but for rounding, 1e-4 at most. It can be pickled, for a
    DataLoader's processes.

    crop: side of the central square, as a part of the shorter side. mean, std: three numbers each, for values in 0…1.
    """
    return v2.Compose(
        [
            AsLoaded(),
            CentralSquare(crop),
            v2.ToDtype(torch.float32, scale=True),  # before it is resized, so that nothing is rounded to bytes
            v2.Resize((size, size), antialias=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )


class AsLoaded(nn.Module):
    """Pillow's image as the loaders have it: upright by its EXIF orientation, RGB, transparency on white."""

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return image
        image.load()  # by which a TIFF turns itself
        return torch.from_numpy(to_rgb(ImageOps.exif_transpose(image))).permute(2, 0, 1)


class CentralSquare(nn.Module):
    """The central square, its side a part of the shorter side: that of views/draw.py."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.part = part

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        side = max(1, round(min(height, width) * self.part))
        top, left = (height - side) // 2, (width - side) // 2
        return image[..., top : top + side, left : left + side]

    def extra_repr(self) -> str:
        return f"part={self.part}"
