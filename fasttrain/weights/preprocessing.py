"""How images are prepared for an encoder, in words that travel beside its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torchvision.transforms import v2


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

    def transform(self) -> v2.Compose:
        """The same for torchvision: a Pillow image, or a tensor (…, 3, H, W), uint8 or float in 0…1, becomes
        (…, 3, size, size) float32."""
        from fasttrain.weights.transform import central_transform

        return central_transform(self.size, self.crop, self.mean, self.std)

    def lines(self) -> list[str]:
        """The same as Python, as `transform`. torchvision's usual Resize and CenterCrop cut at a whole pixel after
        resizing, which shows a place up to a pixel beside."""
        return [
            "import numpy as np",
            "import torch",
            "from PIL import Image, ImageOps",
            "from torchvision.transforms.v2 import functional as F",
            "def transform(image):",
            "    image = ImageOps.exif_transpose(image)",
            "    if image.mode.startswith('I;16'):  # which Pillow would clip",
            "        image = Image.fromarray((np.asarray(image) >> 8).astype('uint8'))",
            "    layer = image.convert('RGBA')",
            "    image = Image.new('RGB', layer.size, 'white')",
            "    image.paste(layer, mask=layer)",
            "    pixels = F.to_dtype(F.to_image(image), torch.float32, scale=True)",
            "    height, width = pixels.shape[-2:]",
            f"    side = max(1, round({self.crop} * min(height, width)))",
            "    place = (height - side) // 2, (width - side) // 2, side, side",
            f"    pixels = F.resized_crop(pixels, *place, [{self.size}, {self.size}], antialias=True)",
            f"    return F.normalize(pixels, {list(self.mean)}, {list(self.std)})",
        ]
