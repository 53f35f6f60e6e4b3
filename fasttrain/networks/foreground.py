"""What an encoder makes of the foreground and of the background of a view, told apart by colour alone.

The foreground is what stands out from the colours of the view's border: no labels, and no geometry of crops. A hook
keeps the map that the encoder's features are the mean of, and its means over both regions are features, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.system.errors import UserError
from fasttrain.system.memory import is_full_memory

GRID = 16  # places along a side at which a view is looked at
FLOOR = 0.05  # added to the border's variance: on one that is even, noise is not to stand out
LEAST = 1e-6  # weight of a place, so that a region without any is the whole view
SIDE = 64  # px: of the views with which the map is looked for, at which customary networks leave several places


class Regions(NamedTuple):
    """What an encoder makes of views.

    feature_NF: its features. region_N2F: those of the foreground and of the background. area_N: the mean saliency.
    """

    feature_NF: Tensor
    region_N2F: Tensor
    area_N: Tensor


class RegionEncoder:
    """An encoder (N, 3, S, S) → (N, F) that is asked for its features and for those of two regions.

    It is no network of its own. Where the encoder is called by itself the hook does nothing.
    """

    def __init__(self, encoder: nn.Module, place: str) -> None:
        """place: see `map_place`."""
        self._encoder, self._asked = encoder, False
        self._map_NFhw: Tensor | None = None  # while the encoder is asked
        encoder.get_submodule(place).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        if self._asked:
            self._map_NFhw = output

    def __call__(self, view: Tensor) -> Regions:
        """Raises UserError for views so small that they leave a map of one place."""
        self._asked = True
        feature_NF = self._encoder(view)
        self._asked = False
        map_NFhw, self._map_NFhw = self._map_NFhw, None
        assert map_NFhw is not None
        height, width = map_NFhw.shape[2:]
        if height * width == 1:
            raise UserError(
                f"--foreground needs a feature map of several places, and views of {view.shape[-1]} px leave one: take "
                "a larger --size, or --cifar-stem"
            )
        a_Nhw = F.adaptive_avg_pool2d(saliency(view), (height, width))
        return Regions(feature_NF, region_features(map_NFhw, a_Nhw), a_Nhw.mean((1, 2)))


@torch.no_grad()
def saliency(view: Tensor) -> Tensor:
    """How much each place of a view stands out, 0…1: (N, 3, S, S) → (N, GRID, GRID), fp32, without gradient.

    The distance of its colour from the mean of the view's border, in the border's deviations of brightness, red against
    green and yellow against blue, times e^−r², r the distance from the middle in halves of a side. A view of one colour
    is 0 throughout.
    """
    red, green, blue = F.adaptive_avg_pool2d(view.float(), GRID).unbind(1)
    axes = (red + green + blue) / 3**0.5, (red - green) / 2**0.5, (red + green - 2 * blue) / 6**0.5
    colour_N3hw = torch.stack(axes, 1)
    edges = colour_N3hw[..., 0, :], colour_N3hw[..., -1, :], colour_N3hw[..., 1:-1, 0], colour_N3hw[..., 1:-1, -1]
    variance_N3, mean_N3 = torch.var_mean(torch.cat(edges, 2), 2, correction=0)
    squared_N3hw = (colour_N3hw - mean_N3[..., None, None]).square() / (variance_N3 + FLOOR)[..., None, None]
    side = torch.linspace(-1, 1, GRID, device=view.device)
    seen_Nhw = squared_N3hw.sum(1).sqrt() * (-side[:, None].square() - side.square()).exp()
    low_N, high_N = seen_Nhw.flatten(1).aminmax(dim=1)
    return (seen_Nhw - low_N[:, None, None]) / (high_N - low_N).clamp_min(LEAST)[:, None, None]


def region_features(map_NFhw: Tensor, saliency_Nhw: Tensor) -> Tensor:
    """Σ_p w_p f_p / Σ_p w_p over the places p of a map, w the saliency a and 1 − a: (N, 2, F), in the map's dtype.

    A region without weight is the whole map.
    """
    a_NP = saliency_Nhw.flatten(1)
    weight_N2P = torch.stack([a_NP, 1 - a_NP], 1) + LEAST
    share_N2P = weight_N2P / weight_N2P.sum(2, keepdim=True)
    return share_N2P.to(map_NFhw.dtype) @ map_NFhw.flatten(2).mT


@torch.no_grad()
def map_place(encoder: nn.Module) -> str:
    """The name of the last module whose output (N, F, h, w), of several places, has the encoder's features as its mean.

    By a forward pass of noise in evaluation mode. Raises UserError where there is none.
    """
    outputs: list[tuple[str, object]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.append((name, output)))
        for name, module in encoder.named_modules()
    ]
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    places = []
    try:
        features = encoder.eval()(noise)
        places = [name for name, output in outputs if _is_map_of(features, output)]
    except Exception as error:  # a stranger's network may raise anything, and vision transformers do for such views
        if is_full_memory(error):
            raise
    finally:
        encoder.train()
        for hook in hooks:
            hook.remove()
    if not places:
        raise UserError("--foreground needs a convolutional encoder, whose features are the mean of a feature map")
    return places[-1]


def _is_map_of(features: Tensor, output: object) -> bool:
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[:2] != features.shape:
        return False
    return output.shape[2:].numel() > 1 and bool((output.mean((2, 3)) - features).norm() < 1e-3 * features.norm())
