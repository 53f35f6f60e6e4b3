"""How views are drawn: a ViewSpec each, and the recipes of the methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn. Probabilities are in 0…1; blur sigmas are in pixels of the output."""

    scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, as a fraction of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue (turns)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


@dataclass(frozen=True)
class ViewRecipe:
    """One ViewSpec per view, so that the views of an image may be drawn differently."""

    name: str
    views: tuple[ViewSpec, ...]


# MoCo v1 and v2: He et al. 2020, Chen et al. 2020; v3: Chen et al. 2021, as in each one's published code.
# v1's code turns gray before the jitter; here, as in v2 and v3, gray comes after it.
_V1 = ViewSpec(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur_p=0.0)


_V2 = ViewSpec()


_V3_FIRST = ViewSpec(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)


_V3_SECOND = ViewSpec(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=0.1, solarize_p=0.2)


_CIFAR = ViewSpec(scale=(0.08, 1.0), blur_p=0.0)  # MoCo's CIFAR-10 notebook


RECIPES = {
    recipe.name: recipe
    for recipe in (
        ViewRecipe("mocov1", (_V1, _V1)),
        ViewRecipe("mocov2", (_V2, _V2)),
        ViewRecipe("mocov3", (_V3_FIRST, _V3_SECOND)),
        ViewRecipe("cifar", (_CIFAR, _CIFAR)),
    )
}
