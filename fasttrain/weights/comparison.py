"""An encoder's features beside those of what was written of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fasttrain.system.errors import RunError
from fasttrain.weights.exported import Loaded, Source

AT_ONCE = 5  # images, so that the last batch is smaller: a file must not have their number fixed


class Difference(NamedTuple):
    """Of features read back from the encoder's: relative is the largest over the images of ‖a − b‖ / ‖a‖, absolute the
    largest of one feature."""

    relative: float
    absolute: float


@torch.no_grad()
def difference(source: Source, loaded: Loaded, views: Tensor) -> Difference:
    """Of the features of views (N, 3, size, size). Raises RunError for an encoder that has no features to compare."""
    own = source.encoder(views)
    other = torch.cat([loaded.features(few) for few in views.split(AT_ONCE)])
    if own.shape != other.shape:
        raise RunError(f"features by {loaded.by} are {tuple(other.shape)}, the encoder's {tuple(own.shape)}")
    norm_N = own.norm(dim=1)
    if not own.isfinite().all() or not norm_N.all():
        raise RunError("the encoder gives features that are 0 or no numbers, which can't be compared")
    apart = own - other
    return Difference(float((apart.norm(dim=1) / norm_N).max()), float(apart.abs().max()))


@torch.no_grad()
def prepared(source: Source, loaded: Loaded, views: Tensor, pictures: list[Image.Image]) -> dict[str, float]:
    """How far the library's own preparation of the images is from the run's, views (N, 3, size, size): the mean in
    levels of 0 to 255, and what that does to features, as the mean of ‖a − b‖ / ‖a‖. {} where it has none."""
    if loaded.transform is None:
        return {}
    theirs = torch.stack([loaded.transform(picture) for picture in pictures])
    levels = (theirs - views).abs() * (255 * torch.tensor(source.preprocessing.std)[:, None, None])
    own, moved = source.encoder(views), source.encoder(theirs)
    apart = (own - moved).norm(dim=1) / own.norm(dim=1)
    return {"preprocessing_levels": float(levels.mean()), "preprocessing_difference": float(apart.mean())}
