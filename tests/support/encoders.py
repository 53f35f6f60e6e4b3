"""Encoders without a run around them, whose statistics are not those of fresh batch norm, and pictures for them."""

from typing import Any

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor, nn

from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.weights.exported import Source
from fasttrain.weights.preprocessing import Preprocessing

STATISTICS = (0.47, 0.45, 0.4), (0.26, 0.25, 0.27)


@torch.no_grad()
def unlike_fresh(encoder: nn.Module) -> nn.Module:
    """Every scale, shift and running statistic gets a value of its own; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    drawn = 0.2 * torch.rand(tensor.shape, generator=generator)
                    tensor.copy_(drawn + (0 if name in ("bias", "running_mean") else 0.9))
    return encoder.eval().requires_grad_(False)


def source(arch: str, size: int = 32, crop: float = 1.0, **options: Any) -> Source:
    """What is exported of an encoder of these options."""
    torch.manual_seed(0)
    made = EncoderOptions(arch=arch, **options)
    return Source(unlike_fresh(make_encoder(made, size)[0]), made, Preprocessing(size, crop, *STATISTICS))


def photographs(count: int) -> list[Image.Image]:
    """Parts of the photograph that matplotlib brings, in several shapes."""
    with get_sample_data("grace_hopper.jpg") as file:
        whole = Image.open(file).convert("RGB")
    boxes = [(40 * number, 30 * number, 260 + 40 * number, 210 + 50 * number) for number in range(count)]
    return [whole.crop(box) for box in boxes]


def smooth_pictures(count: int = 4) -> list[Image.Image]:
    """Of waves a picture wide, in several shapes: a crop that is a pixel beside looks nearly the same."""
    found = []
    for number in range(count):
        height, width = 100 + 17 * number, 150 - 23 * number
        y, x = np.mgrid[:height, :width] / 100
        waves = [np.sin(2 * x + number), np.cos(2 * y + number), np.sin(x + y)]
        found.append(Image.fromarray((127.5 + 120 * np.stack(waves, 2)).astype(np.uint8)))
    return found


def relative(own: Tensor, other: Tensor) -> float:
    """The largest difference of an image's features, as a part of their norm."""
    assert own.shape == other.shape
    return float(((own - other).norm(dim=1) / own.norm(dim=1)).max())
