"""Foreground and background of views: what stands out, where an encoder's map is, and its means over both."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fasttrain.networks import foreground
from fasttrain.networks.encoders import Small
from fasttrain.networks.foreground import GRID, RegionEncoder, map_place, region_features, saliency
from fasttrain.networks.recompute import checkpoint_activations
from fasttrain.system.errors import UserError


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_regions_value_and_gradient() -> None:
    maps, a = numbers(3, 5, 2, 4).requires_grad_(), numbers(3, 2, 4, seed=1).sigmoid()
    expected = torch.stack([
        torch.stack([
            sum(w[i, y, x] * maps[i, :, y, x] for y in range(2) for x in range(4)) / w[i].sum() for w in (a, 1 - a)
        ])
        for i in range(3)
    ])  # fmt: skip
    ours = region_features(maps, a)
    assert torch.allclose(ours, expected, atol=1e-5)  # but for the least weight of a place
    weight = numbers(3, 2, 5, seed=2)
    one, other = (torch.autograd.grad((x * weight).sum(), maps)[0] for x in (ours, expected))
    assert torch.allclose(one, other, atol=1e-5)
    assert one.abs().min() > 0


def test_a_region_that_is_everything_or_nothing_is_the_mean() -> None:
    maps = numbers(3, 5, 2, 4)
    mean = maps.mean((2, 3))[:, None].expand(3, 2, 5)
    for a in (torch.ones(3, 2, 4).double(), torch.zeros(3, 2, 4).double(), torch.full((3, 2, 4), 0.3).double()):
        assert torch.allclose(region_features(maps, a), mean, atol=1e-12)


def test_regions_of_a_map_cut_in_two_are_its_parts() -> None:
    maps, a = numbers(3, 5, 2, 4), torch.zeros(3, 2, 4).double()
    a[..., :2] = 1
    found = region_features(maps, a)
    assert torch.allclose(found[:, 0], maps[..., :2].mean((2, 3)), atol=1e-5)
    assert torch.allclose(found[:, 1], maps[..., 2:].mean((2, 3)), atol=1e-5)


def square(side: int, colour: tuple[float, ...], seed: int = 0) -> Tensor:
    """A view of dim noise with a square of a colour in its middle half."""
    view = 0.1 * numbers(1, 3, side, side, seed=seed, dtype=torch.float32)
    quarter = slice(side // 4, side - side // 4)
    view[..., quarter, quarter] += torch.tensor(colour)[:, None, None]
    return view


@pytest.mark.parametrize("colour", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (0.8, -0.8, 0.0), (0.5, 0.5, -1.0)])
@pytest.mark.parametrize("side", [16, 40, 64])
def test_what_differs_from_the_border_stands_out(colour: tuple[float, ...], side: int) -> None:
    found = saliency(square(side, colour))
    assert found.shape == (1, GRID, GRID)
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    inside = found[:, 5:11, 5:11]
    found = found.clone()
    found[:, 3:13, 3:13] = 0
    assert inside.min() > 0.5 > 0.3 > found.max()


def test_saliency_is_of_the_view_alone() -> None:
    views = torch.cat([square(32, (1.0, 0.2, -0.4), seed) for seed in range(4)])
    whole = saliency(views.requires_grad_())
    assert not whole.requires_grad
    assert torch.allclose(whole[2:3], saliency(views[2:3]), atol=1e-6)
    assert torch.allclose(saliency(views.flip(3)), whole.flip(2), atol=1e-5)
    assert torch.allclose(saliency(views + 3), whole, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(saliency(views), whole)
    assert saliency(views.bfloat16()).dtype == torch.float32


def test_a_view_of_one_colour_has_no_foreground() -> None:
    view = torch.full((2, 3, 32, 32), 0.7)
    assert torch.equal(saliency(view), torch.zeros(2, GRID, GRID))
    assert saliency(torch.full((2, 3, 32, 32), torch.nan)).isnan().all()


class Pooled(nn.Module):
    """A convolution and a ReLU that is called twice, pooled by an expression and not by a module."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 6, 3, 2), nn.ReLU(inplace=True)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.second(self.relu(self.first(x)))))


def resnet() -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network


@pytest.mark.parametrize(
    ("make", "place"), [(Small, "4"), (resnet, "layer4"), (lambda: Pooled(lambda x: x.mean((2, 3))), "relu")]
)
def test_the_map_is_found_and_its_mean_is_the_features(make: Any, place: str) -> None:
    torch.manual_seed(0)
    encoder = make()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert map_place(encoder) == place
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training
    assert not any(module._forward_hooks for module in encoder.modules())
    asked = RegionEncoder(encoder, place)
    view = numbers(4, 3, 64, 64, dtype=torch.float32)
    encoder.eval()
    seen = asked(view)
    assert torch.allclose(seen.feature_NF, encoder(view))
    assert asked._map_NFhw is None
    a = nn.functional.adaptive_avg_pool2d(saliency(view), {"4": 8, "layer4": 2, "relu": 15}[place])
    assert torch.allclose(seen.area_N, a.mean((1, 2)))
    # the regions make up the whole
    whole = (a.mean((1, 2))[:, None] * seen.region_N2F[:, 0]) + (1 - a.mean((1, 2)))[:, None] * seen.region_N2F[:, 1]
    assert torch.allclose(whole, seen.feature_NF, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "encoder",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 6)),
        Pooled(lambda x: x.amax((2, 3))),
        Pooled(lambda x: x.flatten(1)),
        nn.Sequential(Small(), nn.Linear(256, 256)),
        nn.Sequential(Small(), nn.LayerNorm(256)),
    ],
)
def test_features_that_are_no_mean_of_a_map_are_refused(encoder: nn.Module) -> None:
    with pytest.raises(UserError, match="--foreground needs a convolutional encoder"):
        map_place(encoder)
    assert encoder.training
    assert not any(module._forward_hooks for module in encoder.modules())


def test_a_map_of_one_place_is_refused() -> None:
    asked = RegionEncoder(Small(), "4")
    with pytest.raises(UserError, match="views of 8 px leave one"):
        asked(torch.zeros(4, 3, 8, 8))


def test_an_encoder_that_recomputes_its_activations_has_the_same_gradient() -> None:
    view, found = numbers(6, 3, 32, 32, dtype=torch.float32), []
    for recomputes in (False, True):
        torch.manual_seed(0)
        encoder = Small()
        asked = RegionEncoder(encoder, map_place(encoder))
        if recomputes:
            checkpoint_activations(encoder)
        seen = asked(view)
        (seen.feature_NF.square().sum() + seen.region_N2F.square().sum()).backward()
        found.append([p.grad for p in encoder.parameters()])
        assert asked._map_NFhw is None
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(*found, strict=True))


def test_places_are_weighed_on_finer_maps_than_saliency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "saliency", lambda view: torch.rand(len(view), GRID, GRID))
    encoder = Pooled(lambda x: x.mean((2, 3)))
    assert RegionEncoder(encoder, "relu")(torch.randn(2, 3, 96, 96)).region_N2F.isfinite().all()
