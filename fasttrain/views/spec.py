"""How views are drawn: a ViewSpec for each kind of view, recipes of them, and what a person may change in a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fasttrain.system.errors import UserError

BLUR_SIDE = 224  # px: side of the view that blur sigmas are meant for


@dataclass(frozen=True)
class ViewSpec:
    """How some views are drawn. Probabilities are in 0…1.

    blur_sigma is in pixels of a view of 224 px. On a view of another side it is scaled with the side, so that growing
    views and small crops lose the same details; unscaled, the customary 2 px would wipe out a view of 32 px.
    """

    scale: tuple[float, float] = (0.2, 1.0)  # area of the crop, as a fraction of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue (turns)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    gray_first: bool = False  # gray before the jitter, which then changes brightness and contrast only
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    size: float = 1.0  # side of the view, as a part of the run's --size
    count: int = 1  # so many views are drawn like this, each anew


Recipe = tuple[ViewSpec, ...]

# MoCo v1 and v2: He et al. 2020, Chen et al. 2020; v3: Chen et al. 2021, whose views are BYOL's (Grill et al. 2020) but
# for the crops; SimCLR: Chen et al. 2020; SwAV: Caron et al. 2020 (two views and six small crops, which it
# blurs by as many of their own pixels); DINO: Caron et al. 2021 (two views and eight small crops, parted at 0.14 of the
# area with ResNets, at 0.4 with vision transformers); ReSSL: Zheng et al. 2021 (a strong view for the query, a weak one
# for the key). As in each one's published code.
_V1 = ViewSpec(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True, blur_p=0.0)
_V2 = ViewSpec()
_V3_FIRST = ViewSpec(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)
_V3_SECOND = ViewSpec(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=0.1, solarize_p=0.2)
_CIFAR = ViewSpec(scale=(0.08, 1.0), blur_p=0.0)  # MoCo's CIFAR-10 notebook
_BYOL_FIRST, _BYOL_SECOND = (replace(spec, scale=(0.08, 1.0)) for spec in (_V3_FIRST, _V3_SECOND))
_SIMCLR = ViewSpec(scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2))
_WEAK = ViewSpec(jitter_p=0.0, gray_p=0.0, blur_p=0.0)
_ASYMMETRIC = ViewSpec(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur_p=0.0)  # solo-learn's for CIFAR-10
_SWAV = ViewSpec(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), count=2)
_SWAV_SMALL = replace(
    _SWAV, scale=(0.05, 0.14), blur_sigma=(0.1 * BLUR_SIDE / 96, 2.0 * BLUR_SIDE / 96), size=96 / 224, count=6
)


def _dino(parted: float) -> Recipe:
    """Two views of the areas above `parted`, eight small crops of those below."""
    first, second = (replace(spec, scale=(parted, 1.0)) for spec in (_V3_FIRST, _V3_SECOND))
    return first, second, replace(first, scale=(0.05, parted), blur_p=0.5, size=96 / 224, count=8)


RECIPES: dict[str, Recipe] = {
    "mocov1": (_V1, _V1),
    "mocov2": (_V2, _V2),
    "mocov3": (_V3_FIRST, _V3_SECOND),
    "byol": (_BYOL_FIRST, _BYOL_SECOND),
    "simclr": (_SIMCLR, _SIMCLR),
    "weak-key": (_V2, _WEAK),
    "cifar": (_CIFAR, _CIFAR),
    "cifar-asymmetric": (_ASYMMETRIC, replace(_ASYMMETRIC, solarize_p=0.2)),
    "swav": (_SWAV, _SWAV_SMALL),
    "dino": _dino(0.14),
    "dino-vit": _dino(0.4),
}


def num_views(recipe: Recipe) -> int:
    """How many views an image gets."""
    return sum(spec.count for spec in recipe)


def expanded(recipe: Recipe) -> Recipe:
    """One spec for each view, in the order of the views."""
    return tuple(replace(spec, count=1) for spec in recipe for _ in range(spec.count))


def repeated(recipe: Recipe, count: int) -> Recipe:
    """`count` views, as equally many of each of the recipe's specs as can be, the first ones having more."""
    counts = (len(range(place, count, len(recipe))) for place in range(len(recipe)))
    return tuple(replace(spec, count=n) for spec, n in zip(recipe, counts, strict=True) if n)


def sides(recipe: Recipe, size: int) -> tuple[int, ...]:
    """The side in pixels of each view, where a view of full size has side `size`: rounded, and at least 1."""
    return tuple(max(1, round(spec.size * size)) for spec in expanded(recipe))


def adjusted(
    recipe: Recipe,
    crop_scale: Iterable[float] | None = None,
    jitter: Iterable[float] | None = None,
    jitter_p: float | Iterable[float] | None = None,
    blur_p: float | Iterable[float] | None = None,
    solarize_p: float | Iterable[float] | None = None,
) -> Recipe:
    """A recipe with some of its numbers replaced by those a person gave; None leaves what the recipe says.

    crop_scale: the least and greatest area of a crop, as fractions of the image's, 0 < least ≤ greatest ≤ 1, for the
    views of full size alone: small crops are small on purpose, and keep their scale. jitter: four strengths for all
    views, not negative, the hue's at most 0.5. Probabilities in 0…1: one for all specs, or one for each spec of the
    recipe in their order (a spec's views share it).
    Raises UserError for anything else.
    """
    if crop_scale is not None:
        scale = _crop_scale(tuple(crop_scale))
        recipe = tuple(replace(spec, scale=scale) if spec.size == 1 else spec for spec in recipe)
    if jitter is not None:
        strengths = _strengths(tuple(jitter))
        recipe = tuple(replace(spec, jitter=strengths) for spec in recipe)
    columns = (
        _probabilities("jitter", jitter_p, [spec.jitter_p for spec in recipe]),
        _probabilities("blur", blur_p, [spec.blur_p for spec in recipe]),
        _probabilities("solarize", solarize_p, [spec.solarize_p for spec in recipe]),
    )
    return tuple(
        replace(spec, jitter_p=p_jitter, blur_p=p_blur, solarize_p=p_solarize)
        for spec, p_jitter, p_blur, p_solarize in zip(recipe, *columns, strict=True)
    )


def _crop_scale(given: tuple[float, ...]) -> tuple[float, float]:
    if len(given) != 2 or not 0 < given[0] <= given[1] <= 1:
        raise UserError(f"crop scale {_words(given)}: give the least and the greatest area, above 0 and at most 1")
    return given[0], given[1]


def _strengths(given: tuple[float, ...]) -> tuple[float, float, float, float]:
    if len(given) != 4 or not all(0 <= strength < float("inf") for strength in given) or given[3] > 0.5:
        raise UserError(
            f"jitter {_words(given)}: give the strengths of brightness, contrast, saturation and hue, none negative, "
            "the hue's at most 0.5"
        )
    return given[0], given[1], given[2], given[3]


def _probabilities(name: str, given: float | Iterable[float] | None, present: list[float]) -> list[float]:
    """One for each spec: as given, or the present ones."""
    if given is None:
        return present
    values, specs = list(given) if isinstance(given, Iterable) else [given], len(present)
    if len(values) not in (1, specs) or not all(0 <= value <= 1 for value in values):
        raise UserError(
            f"probability of {name} {_words(values)}: give one number from 0 to 1, or one for each of the recipe's "
            f"{specs} kinds of views"
        )
    return values * specs if len(values) == 1 else values


def _words(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
