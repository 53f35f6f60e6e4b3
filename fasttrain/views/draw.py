"""View parameters: what is cut from each image and how its colours change, drawn for a whole batch at once.

All randomness of the augmentation is here. `kernels/augment` applies the table that `draw` returns and draws nothing,
so views do not depend on the device, the rank, the number of workers or a restart.

Axes in names: B image of the batch, V view of an image, 4 as said beside the name.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.augment.table import HUE, SATURATION, ViewTable
from fasttrain.views.spec import BLUR_SIDE, Recipe, ViewSpec, expanded, num_views, sides

SMALL_VIEW = 64  # px; views this small show the whole of a small picture, larger ones the customary centre crop
_PERMUTATIONS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)

# Each row (one image, one view) consumes the same 36 uniform numbers whatever the recipe, at these places.
_AREA, _RATIO, _FACTOR = slice(0, 10), slice(10, 20), slice(25, 29)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(20, 25)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(29, 33)
_BLOCKS = 9  # of four numbers


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").

    counter: (…, 4) uint32, key: (2,) uint32. Returns (…, 4) uint32, uniform, each a function of its counter and key.
    """
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & low, (a >> shift) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def draw(
    recipe: Recipe, height_B: Tensor, width_B: Tensor, index_B: Tensor, seed: int, epoch: int, size: int
) -> ViewTable:
    """Draws the views of one batch.

    height_B, width_B: int32, the images' sizes in pixels; index_B: int64, the samples' indices in the data set;
    seed: any integer, of which the low 64 bits are used; size: side in pixels of a view of full size, which the blur
    alone depends on. A row depends on nothing but (seed, epoch, sample index, view), its image's size and `size`: not
    on the batch it is drawn in. Sample indices and epochs must lie in 0…2³²−1.

    The crop is torchvision's RandomResizedCrop.get_params, the jitter torchvision's ColorJitter: the four operations in
    uniformly random order, each factor uniform in [max(0, 1 − x), 1 + x], the hue's turn uniform in [−x, x].
    Raises ValueError for an epoch or an index out of range.
    """
    uniform_BVK = _uniforms(index_B.numpy(), num_views(recipe), seed, epoch)
    names, specs = ViewSpec.__dataclass_fields__, expanded(recipe)
    per_view = {name: np.array([getattr(spec, name) for spec in specs]) for name in names}
    crop_BV4 = _crops(uniform_BVK, height_B.numpy(), width_B.numpy(), per_view["scale"], per_view["ratio"])
    order_BV4, strength_BV4 = _jitters(uniform_BVK, per_view["jitter"], per_view["jitter_p"])
    gray_BV = uniform_BVK[..., _GRAY] < per_view["gray_p"]
    first_BV = gray_BV & per_view["gray_first"]
    _gray_first(first_BV, order_BV4, strength_BV4)
    low_V, high_V = per_view["blur_sigma"].T
    side_V = np.array(sides(recipe, size))
    sigma_BV = (low_V + uniform_BVK[..., _SIGMA] * (high_V - low_V)) * (side_V / BLUR_SIDE)
    blurred_BV = (uniform_BVK[..., _BLUR] < per_view["blur_p"]) & (side_V > 1)  # one pixel has no neighbours
    return ViewTable(
        crop_BV4=torch.from_numpy(crop_BV4.astype(np.int32)),
        flip_BV=torch.from_numpy(uniform_BVK[..., _FLIP] < per_view["flip"]),
        order_BV4=torch.from_numpy(order_BV4.astype(np.int8)),
        strength_BV4=torch.from_numpy(strength_BV4.astype(np.float32)),
        gray_BV=torch.from_numpy(gray_BV & ~first_BV),
        sigma_BV=torch.from_numpy(np.where(blurred_BV, sigma_BV, 0.0).astype(np.float32)),
        solarize_BV=torch.from_numpy(uniform_BVK[..., _SOLARIZE] < per_view["solarize_p"]),
    )


def center(height_B: Tensor, width_B: Tensor, fraction: float) -> ViewTable:
    """The evaluation's single view: the central square of side round(fraction · shorter side), otherwise untouched.

    height_B, width_B: int32, in pixels; fraction in 0…1 (0.875 is the customary 224 of 256). A side is at least 1.
    """
    side_B = torch.minimum(height_B, width_B).double().mul(fraction).round().clamp(min=1).int()
    top_B = (height_B.int() - side_B) // 2
    left_B = (width_B.int() - side_B) // 2
    shape = (len(side_B), 1)
    return ViewTable(
        crop_BV4=torch.stack((top_B, left_B, side_B, side_B), dim=-1)[:, None].contiguous(),
        flip_BV=torch.zeros(shape, dtype=torch.bool),
        order_BV4=torch.full((*shape, 4), -1, dtype=torch.int8),
        strength_BV4=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(*shape, 1),
        gray_BV=torch.zeros(shape, dtype=torch.bool),
        sigma_BV=torch.zeros(shape),
        solarize_BV=torch.zeros(shape, dtype=torch.bool),
    )


def crop_fraction(size: int) -> float:
    """Side of the square that is evaluated, as a part of the image's shorter side, for views of a size."""
    return 1.0 if size <= SMALL_VIEW else 0.875


def _uniforms(index_B: np.ndarray, views: int, seed: int, epoch: int) -> np.ndarray:
    """(B, V, 36) float64, uniform in [0, 1): the counter is (block, view, sample index, epoch), the key the seed."""
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch {epoch} is outside 0…2^32-1")
    if len(index_B) and not 0 <= index_B.min() <= index_B.max() < 2**32:
        raise ValueError(f"sample indices {index_B.min()}…{index_B.max()} leave 0…2^32-1")
    counter = np.empty((len(index_B), views, _BLOCKS, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(_BLOCKS)
    counter[..., 1] = np.arange(views)[:, None]
    counter[..., 2] = index_B[:, None, None]
    counter[..., 3] = epoch
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)
    return philox(counter, key).reshape(len(index_B), views, _BLOCKS * 4) * 2.0**-32


def _crops(
    uniform_BVK: np.ndarray, height_B: np.ndarray, width_B: np.ndarray, scale_V2: np.ndarray, ratio_V2: np.ndarray
) -> np.ndarray:
    """Random resized crops (B, V, 4): the first of ten random boxes that fits the image, else its central part."""
    height, width = (size_B.astype(np.float64)[:, None, None] for size_B in (height_B, width_B))
    low, high = scale_V2[:, :1], scale_V2[:, 1:]
    area = height * width * (low + uniform_BVK[..., _AREA] * (high - low))
    low, high = np.log(ratio_V2[:, :1]), np.log(ratio_V2[:, 1:])
    ratio = np.exp(low + uniform_BVK[..., _RATIO] * (high - low))
    tried_w, tried_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tried_w > 0) & (tried_w <= width) & (tried_h > 0) & (tried_h <= height)
    first = fits.argmax(axis=-1)[..., None]
    found = fits.any(axis=-1)

    height, width = height[..., 0], width[..., 0]
    whole_w = np.minimum(width, np.rint(height * ratio_V2[:, 1]))
    whole_h = np.minimum(height, np.rint(width / ratio_V2[:, 0]))
    crop_w = np.where(found, np.take_along_axis(tried_w, first, axis=-1)[..., 0], whole_w)
    crop_h = np.where(found, np.take_along_axis(tried_h, first, axis=-1)[..., 0], whole_h)
    # An image whose ratio the range excludes may round to an empty crop; one pixel is the least there is.
    crop_h, crop_w = np.maximum(crop_h, 1), np.maximum(crop_w, 1)
    spare_h, spare_w = height - crop_h, width - crop_w
    top = np.where(found, np.floor(uniform_BVK[..., _TOP] * (spare_h + 1)), spare_h // 2)
    left = np.where(found, np.floor(uniform_BVK[..., _LEFT] * (spare_w + 1)), spare_w // 2)
    return np.stack((top, left, crop_h, crop_w), axis=-1)


def _jitters(uniform_BVK: np.ndarray, jitter_V4: np.ndarray, jitter_p_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order (B, V, 4) of the colour operations, -1 where none, and their strengths (B, V, 4)."""
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    low_V4 = neutral - jitter_V4
    low_V4[:, :HUE] = np.maximum(low_V4[:, :HUE], 0.0)
    high_V4 = neutral + jitter_V4
    applied_BV4 = (uniform_BVK[..., _JITTER] < jitter_p_V)[..., None] & (jitter_V4 > 0)
    strength_BV4 = low_V4 + uniform_BVK[..., _FACTOR] * (high_V4 - low_V4)
    order_BV4 = _PERMUTATIONS[(uniform_BVK[..., _ORDER] * len(_PERMUTATIONS)).astype(np.int64)]
    order_BV4 = np.where(np.take_along_axis(applied_BV4, order_BV4, axis=-1), order_BV4, -1)
    return order_BV4, np.where(applied_BV4, strength_BV4, neutral)


def _gray_first(first_BV: np.ndarray, order_BV4: np.ndarray, strength_BV4: np.ndarray) -> None:
    """Puts gray before the jitter of some views, in place.

    A saturation of 0 is gray, so saturation goes to the first place with that strength. Later it would do nothing to a
    gray view, nor would hue, which is left out.
    """
    rest_N4 = order_BV4[first_BV]
    rest_N4[(rest_N4 == SATURATION) | (rest_N4 == HUE)] = -1
    at_N4 = np.argsort(rest_N4 < 0, axis=-1, kind="stable")  # those left come first, in their order; two at the most
    order_BV4[first_BV, 0] = SATURATION
    order_BV4[first_BV, 1:] = np.take_along_axis(rest_N4, at_N4, axis=-1)[:, :3]
    strength_BV4[first_BV, SATURATION] = 0.0
    strength_BV4[first_BV, HUE] = 0.0
