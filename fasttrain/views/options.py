"""The options of views: their recipe, what is changed in it, and their side as the epochs pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fasttrain.system.errors import UserError
from fasttrain.system.options import Bounds, Fraction, NotNegative, Options, Positive
from fasttrain.views.spec import RECIPES, Recipe, adjusted, repeated, sides

GROWING = 0.75  # part of the epochs in which views grow to their final size
# a recipe without a change in it: what a method's paper or preset changes in one recipe is not for another
AS_DRAWN: dict[str, Any] = {"crop_scale": None, "jitter": None, "jitter_p": (), "blur": (), "solarize": ()}


@dataclass(frozen=True)
class ViewOptions(Options):
    """How an image's views are drawn."""

    recipe: Literal[
        "method", "mocov1", "mocov2", "mocov3", "byol", "simclr", "weak-key", "cifar", "cifar-asymmetric", "swav",
        "dino", "dino-vit",
    ] = "method"  # fmt: skip
    """Augmentation recipe; method: the method's own. Another one must give as many views of full size, or gives more
    of each kind where a method needs more; a method whose own has small crops takes any number of them, or none. It is
    drawn as it is, whatever the method's preset changes in its own."""
    size: Positive[int] = 224
    """Side of a view in pixels, in training and evaluation; of a recipe with several sizes, the largest."""
    resolution: str = ""
    """Views that grow, such as 128:224: the side at first, and the --size that is reached after three quarters of the
    epochs; smaller views of a recipe grow in proportion. Empty: --size throughout."""
    crop_scale: Annotated[tuple[float, float] | None, Bounds(0, 1, low_open=True)] = None
    """Least and greatest area of a crop, as parts of the image's; of views of full size. None: the recipe's."""
    jitter: NotNegative[tuple[float, float, float, float] | None] = None
    """Strengths of the jitter of brightness, contrast, saturation and hue. None: the recipe's."""
    jitter_p: Fraction[tuple[float, ...]] = ()
    """Probability of the jitter: one, or one for each kind of view of the recipe. Empty: the recipe's."""
    blur: Fraction[tuple[float, ...]] = ()
    """Probability of the blur, likewise."""
    solarize: Fraction[tuple[float, ...]] = ()
    """Probability of solarisation, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution and self.size != resolution_sides(self.resolution)[1]:
            final = resolution_sides(self.resolution)[1]
            raise UserError(
                f"--resolution {self.resolution} ends with views of {final} px, --size {self.size} is another"
            )

    @property
    def start_size(self) -> int:
        """Side of the first epoch's views."""
        return resolution_sides(self.resolution)[0] if self.resolution else self.size

    def size_at(self, epoch: int, epochs: int) -> int:
        """Side of an epoch's views: linearly from start_size to size, which is reached after GROWING of the epochs.

        In steps of an encoder's total stride, so that no size wastes pixels.
        """
        stride = 32 if self.size > 64 else 8
        progress = min(1.0, epoch / (GROWING * epochs))
        missing = (self.size - self.start_size) * (1 - progress)
        return max(self.start_size, self.size - round(missing / stride) * stride)

    def recipe_for(self, own: Recipe) -> Recipe:
        """The recipe, with the changes asked for, of a method whose own is given. Raises UserError for one that gives
        it other views, and for numbers out of range.

        A recipe of too few views has more of each kind, for a method whose own are all alike. Small crops are beside
        views of full size: a method that takes some takes any number, or none.
        """
        recipe = own if self.recipe == "method" else RECIPES[self.recipe]
        given, wanted = sides(recipe, BASE), sides(own, BASE)
        alike = len({replace(spec, count=1) for spec in own}) == 1
        if alike and {*given, *wanted} == {BASE} and len(given) < len(wanted):
            recipe, given = repeated(recipe, len(wanted)), wanted
        if given != wanted and (given.count(BASE) != wanted.count(BASE) or set(wanted) <= {BASE}):
            raise UserError(f"--recipe {self.recipe} gives {_described(recipe)}; this method needs {_described(own)}")
        return adjusted(
            recipe, self.crop_scale, self.jitter, self.jitter_p or None, self.blur or None, self.solarize or None
        )


BASE = 224  # px: a side at which recipes are compared


def _described(recipe: Recipe) -> str:
    """As "2 views of full size and 6 of 43 %"."""
    parts = [side / BASE for side in sides(recipe, BASE)]
    counts = {part: parts.count(part) for part in dict.fromkeys(parts)}
    sizes = ["full size" if part == 1 else f"{100 * part:.0f} %" for part in counts]
    return " and ".join(f"{n} views of {size}" for n, size in zip(counts.values(), sizes, strict=True))


def resolution_sides(resolution: str) -> tuple[int, int]:
    """First and final side of a --resolution. Raises UserError where it is not two, the smaller first."""
    found = re.fullmatch(r"(\d+):(\d+)", str(resolution))
    if not found or not 0 < int(found[1]) <= int(found[2]):
        raise UserError(f"--resolution {resolution!r} is not two sides of views such as 128:224, the smaller first")
    return int(found[1]), int(found[2])
