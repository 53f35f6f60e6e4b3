"""The drawn view parameters: a function of seed, epoch, sample and view alone, with torchvision's distributions."""

import itertools
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fasttrain.config import make_config
from fasttrain.kernels.augment.table import HUE, SATURATION, ViewTable
from fasttrain.system.errors import UserError
from fasttrain.views.draw import center, draw, philox
from fasttrain.views.options import ViewOptions
from fasttrain.views.spec import RECIPES, ViewSpec, adjusted, expanded, num_views, repeated, sides

KNOWN_ANSWERS = (  # of Philox4x32-10, published with Random123
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def sizes(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """height_B, width_B, index_B of `count` images of one size."""
    full = torch.ones(count, dtype=torch.int32)
    return full * height, full * width, torch.arange(count)


def rows(table: ViewTable, chosen: torch.Tensor | slice) -> list[torch.Tensor]:
    return [getattr(table, field.name)[chosen] for field in fields(table)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def many() -> ViewTable:
    return draw(RECIPES["mocov2"], *sizes(20_000, 300, 400), seed=7, epoch=3, size=224)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    drawn = philox(np.array([counter, counter], dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert drawn.dtype == np.uint32
    assert drawn.tolist() == [list(answer)] * 2


@pytest.mark.parametrize("name", RECIPES)
def test_row_is_the_same_in_any_batch(name: str) -> None:
    recipe, (height_B, width_B, index_B) = RECIPES[name], sizes(64, 200, 333)
    height_B, index_B = height_B + index_B.int(), index_B + 2**32 - 64  # ragged, and the last indices there are
    whole = draw(recipe, height_B, width_B, index_B, seed=2**63 + 5, epoch=9, size=96)
    assert same(rows(whole, slice(None)), rows(draw(recipe, height_B, width_B, index_B, 2**63 + 5, 9, 96), slice(None)))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = draw(recipe, height_B[order], width_B[order], index_B[order], seed=2**63 + 5, epoch=9, size=96)
    assert same(rows(whole, order), rows(shuffled, slice(None)))
    alone = draw(recipe, height_B[17:18], width_B[17:18], index_B[17:18], seed=2**63 + 5, epoch=9, size=96)
    assert same(rows(whole, slice(17, 18)), rows(alone, slice(None)))


def test_seed_epoch_sample_and_view_all_matter() -> None:
    batch = sizes(32, 300, 400)
    drawn = {
        (seed, epoch): draw(RECIPES["mocov2"], *batch, seed=seed, epoch=epoch, size=96).crop_BV4.flatten(0, 1)
        for seed in (0, 1, 2**32, 2**63) for epoch in (0, 1, 2**32 - 1)
    }  # fmt: skip
    for a, b in itertools.combinations(drawn.values(), 2):
        assert (a != b).any(-1).all()
    assert all(len(crop.unique(dim=0)) == 64 for crop in drawn.values())


def test_a_known_row() -> None:
    """What has been drawn before is drawn again: a run goes on with the views it began with."""
    table = draw(RECIPES["mocov3"], *(column[11:] for column in sizes(12, 300, 401)), seed=7, epoch=3, size=224)
    assert table.crop_BV4.tolist() == [[[12, 33, 274, 365], [32, 70, 242, 200]]]
    assert table.flip_BV.tolist() == [[True, True]]
    assert table.order_BV4.tolist() == [[[HUE, 0, SATURATION, 1], [-1, -1, -1, -1]]]
    strengths = torch.tensor([[[0.8040386, 0.7068681, 0.8892105, -0.0682622], [1.0, 1.0, 1.0, 0.0]]])
    assert torch.allclose(table.strength_BV4, strengths, atol=1e-6)
    assert table.gray_BV.tolist() == [[True, False]]
    assert torch.allclose(table.sigma_BV, torch.tensor([[1.5100993, 0.0]]))
    assert table.solarize_BV.tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["mocov2", "mocov3"])
def test_blur_alone_depends_on_the_size_and_grows_with_it(name: str) -> None:
    batch = sizes(200, 90, 120)
    small, full = (draw(RECIPES[name], *batch, seed=0, epoch=0, size=size) for size in (32, 224))
    assert torch.allclose(small.sigma_BV * 7, full.sigma_BV)
    assert small.sigma_BV.max() < 0.3
    assert same(rows(replace(small, sigma_BV=full.sigma_BV), slice(None)), rows(full, slice(None)))
    assert not draw(RECIPES[name], *batch, seed=0, epoch=0, size=1).sigma_BV.any()


def test_a_view_is_drawn_by_its_own_spec_and_place() -> None:
    """Multi-crop: as many views as the specs say, each as if all views were drawn like it."""
    recipe, batch = RECIPES["swav"], sizes(100, 300, 400)
    assert num_views(recipe) == len(expanded(recipe)) == 8
    assert sides(recipe, 224) == (224, 224, 96, 96, 96, 96, 96, 96)
    assert sides(recipe, 160)[1:3] == (160, 69)
    assert sides(recipe, 1) == (1,) * 8
    table = draw(recipe, *batch, seed=0, epoch=0, size=224)
    for v, spec in enumerate(expanded(recipe)):
        alike = draw((replace(spec, count=8),), *batch, seed=0, epoch=0, size=224)
        assert same([column[:, v] for column in rows(table, slice(None))], [c[:, v] for c in rows(alike, slice(None))])
    area = table.crop_BV4[..., 2:].double().prod(-1) / (300 * 400)
    assert area[:, :2].min() > 0.13
    assert area[:, 2:].max() < 0.15
    assert table.sigma_BV[:, 2:].max() > 1.9  # of their own pixels


def test_mocov1_turns_gray_before_the_jitter() -> None:
    """In the rows that are gray, saturation comes first with strength 0; the others are as without."""
    recipe, batch = RECIPES["mocov1"], sizes(500, 90, 120)
    table = draw(recipe, *batch, seed=0, epoch=0, size=224)
    later = draw(tuple(replace(spec, gray_first=False) for spec in recipe), *batch, seed=0, epoch=0, size=224)
    gray, chosen = later.gray_BV, slice(None)
    assert 0.1 < gray.float().mean() < 0.3
    assert not table.gray_BV.any()
    assert same([column[~gray] for column in rows(table, chosen)], [column[~gray] for column in rows(later, chosen)])
    assert (table.strength_BV4[gray][:, [SATURATION, HUE]] == 0).all()
    for ours, drawn in zip(table.order_BV4[gray].tolist(), later.order_BV4[gray].tolist(), strict=True):
        assert ours == [SATURATION, *(k for k in drawn if k not in (SATURATION, HUE)), -1]
    rare = replace(recipe[0], gray_p=1.0, jitter_p=0.0)
    assert (draw((rare,), *batch, 0, 0, 224).order_BV4 == torch.tensor([SATURATION, -1, -1, -1])).all()


def test_a_recipe_takes_other_numbers() -> None:
    first, second = adjusted(RECIPES["mocov3"], (0.08, 0.5), (0.1, 0.2, 0.3, 0.0), 0.9, (1.0, 0.5), [0.25])
    assert first == replace(
        RECIPES["mocov3"][0], scale=(0.08, 0.5), jitter=(0.1, 0.2, 0.3, 0.0), jitter_p=0.9, blur_p=1.0, solarize_p=0.25
    )
    assert second == replace(
        RECIPES["mocov3"][1], scale=(0.08, 0.5), jitter=(0.1, 0.2, 0.3, 0.0), jitter_p=0.9, blur_p=0.5, solarize_p=0.25
    )
    for recipe in RECIPES.values():
        assert adjusted(recipe) == recipe


def test_small_crops_keep_their_scale() -> None:
    full, small = adjusted(RECIPES["swav"], crop_scale=(0.3, 1.0), blur_p=(0.1, 0.0))
    assert (full.scale, small.scale) == ((0.3, 1.0), RECIPES["swav"][1].scale)
    assert (full.blur_p, small.blur_p) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop scale 0.5 0.2: give the least"), ({"crop_scale": (0.0, 1.0)}, "crop scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop scale"), ({"crop_scale": (0.5,)}, "crop scale 0.5: give"),
        ({"crop_scale": (float("nan"), 1)}, "crop scale"), ({"jitter": (0.4, 0.4, 0.4)}, "jitter 0.4 0.4 0.4: give"),
        ({"jitter": (0.4, -0.1, 0.4, 0.1)}, "jitter"), ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue's at most 0.5"),
        ({"jitter": (float("inf"), 0, 0, 0)}, "jitter"), ({"jitter_p": 1.2}, "probability of jitter 1.2: give one"),
        ({"blur_p": (0.1, -0.1)}, "probability of blur 0.1 -0.1"), ({"blur_p": (1, 1, 1)}, "the recipe's 2 kinds"),
        ({"solarize_p": float("nan")}, "probability of solarize nan"), ({"solarize_p": ()}, "probability of solarize"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_in_one_line(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error) as refused:
        adjusted(RECIPES["mocov2"], **changes)
    assert "\n" not in str(refused.value)


def test_rates_and_ranges(many: ViewTable) -> None:
    def near(values: torch.Tensor, rate: float) -> None:
        assert abs(values.float().mean().item() - rate) < 0.012  # more than three deviations of 40,000 draws

    near(many.flip_BV, 0.5)
    near(many.gray_BV, 0.2)
    near(many.solarize_BV, 0.0)
    blurred = many.sigma_BV > 0
    near(blurred, 0.5)
    sigma = many.sigma_BV[blurred]
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2.0
    near(sigma / 1.05, 1.0)
    jittered = (many.order_BV4 >= 0).all(-1)
    assert torch.equal(jittered, (many.order_BV4 >= 0).any(-1))
    near(jittered, 0.8)
    strength = many.strength_BV4[jittered]
    middle, reach = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.4, 0.4, 0.1])
    assert ((strength - middle).abs() <= reach + 1e-6).all()
    for k in range(4):
        near((strength[:, k] - middle[k] + reach[k]) / (2 * reach[k]), 0.5)
    assert (many.strength_BV4[~jittered] == middle).all()


def test_views_of_one_image_are_uncorrelated(many: ViewTable) -> None:
    for values in (many.flip_BV, many.gray_BV, many.sigma_BV > 0, many.crop_BV4[..., 3], many.strength_BV4[..., 1]):
        assert abs(np.corrcoef(values.double().numpy().T)[0, 1]) < 0.03


def test_operation_order_is_a_uniform_permutation(many: ViewTable) -> None:
    orders = Counter(tuple(order) for order in many.order_BV4.flatten(0, 1).tolist() if order[0] >= 0)
    assert set(orders) == set(itertools.permutations(range(4)))
    expected = orders.total() / 24
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square < 49.7  # 23 degrees of freedom: 0.1 % of fair draws exceed it


def test_operation_without_strength_is_left_out() -> None:
    spec = ViewSpec(jitter=(0.0, 2.0, 0.0, 0.5), jitter_p=1.0)
    table = draw((spec,), *sizes(500, 40, 40), seed=0, epoch=0, size=32)
    assert (table.order_BV4.sort(-1).values == torch.tensor([-1, -1, 1, 3])).all()
    assert table.strength_BV4[..., 1].min() >= 0
    assert table.strength_BV4[..., 1].max() > 2.5
    assert (table.strength_BV4[..., [0, 2]] == 1).all()


def test_asymmetric_recipe() -> None:
    table = draw(RECIPES["mocov3"], *sizes(2000, 40, 40), seed=0, epoch=0, size=32)
    blurred, solarized = (table.sigma_BV > 0).float().mean(0), table.solarize_BV.float().mean(0)
    assert blurred[0] == 1
    assert abs(blurred[1] - 0.1) < 0.03
    assert solarized[0] == 0
    assert abs(solarized[1] - 0.2) < 0.04


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (32, 32), (33, 7), (300, 400)]
)
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    table = draw(RECIPES["cifar"], *sizes(3000, height, width), seed=1, epoch=0, size=32)
    top, left, crop_h, crop_w = table.crop_BV4.unbind(-1)
    assert top.min() >= 0
    assert left.min() >= 0
    assert crop_h.min() >= 1
    assert crop_w.min() >= 1
    assert (top + crop_h).max() <= height
    assert (left + crop_w).max() <= width


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 11), (5, 500)])
def test_fallback_is_torchvisions_central_crop(height: int, width: int) -> None:
    spec = ViewSpec(scale=(0.9, 1.0))  # such a crop of so narrow an image always misses
    table = draw((spec,), *sizes(3, height, width), seed=0, epoch=0, size=32)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert table.crop_BV4.tolist() == [[list(expected)]] * 3


@pytest.mark.parametrize(("height", "width"), [(300, 400), (32, 32), (90, 300)])
def test_crops_have_torchvisions_distribution(height: int, width: int) -> None:
    count = 3000
    table = draw(RECIPES["cifar"], *sizes(count, height, width), seed=5, epoch=0, size=32)
    ours = table.crop_BV4.flatten(0, 1).double()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=torch.double
    )
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.1 * spread).all()  # about 4.5 standard errors
    assert ((ours.std(0) / spread - 1).abs() < 0.1).all()
    area, their_area = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    for quantile in (0.1, 0.5, 0.9):
        assert abs(area.quantile(quantile) / their_area.quantile(quantile) - 1) < 0.12


def test_center() -> None:
    table = center(torch.tensor([300, 5, 1], dtype=torch.int32), torch.tensor([401, 9, 1], dtype=torch.int32), 0.875)
    assert table.crop_BV4.tolist() == [[[19, 69, 262, 262]], [[0, 2, 4, 4]], [[0, 0, 1, 1]]]
    drawn = draw(RECIPES["mocov2"], *sizes(3, 9, 9), seed=0, epoch=0, size=8)
    for field in fields(table):
        ours, theirs = getattr(table, field.name), getattr(drawn, field.name)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs[:, :1].shape
    assert not table.flip_BV.any()
    assert (table.order_BV4 == -1).all()
    assert not table.sigma_BV.any()


def test_out_of_range_counters_are_refused() -> None:
    height_B, width_B, index_B = sizes(2, 9, 9)
    for epoch in (-1, 2**32):
        with pytest.raises(ValueError, match="epoch"):
            draw(RECIPES["cifar"], height_B, width_B, index_B, seed=0, epoch=epoch, size=8)
    for index in (-1, 2**32):
        with pytest.raises(ValueError, match="sample indices"):
            draw(RECIPES["cifar"], height_B, width_B, index_B + index, seed=0, epoch=0, size=8)


@pytest.mark.parametrize("count", range(1, 8))
def test_a_recipe_is_repeated_in_equal_parts(count: int) -> None:
    for name in ("mocov2", "mocov3"):
        first, second = RECIPES[name]
        found = expanded(repeated(RECIPES[name], count))
        assert found == (first,) * -(-count // 2) + (second,) * (count // 2)
        assert ViewOptions(recipe=name).recipe_for(repeated(RECIPES["simclr"][:1], max(2, count)))[0].count == max(
            1, -(-count // 2)
        )


def test_a_recipe_of_too_many_views_is_refused() -> None:
    with pytest.raises(UserError, match="--recipe mocov2 gives 2 views of full size; this method needs 1 views"):
        ViewOptions(recipe="mocov2").recipe_for(RECIPES["simclr"][:1])


def test_a_recipe_is_not_repeated_for_a_method_whose_views_differ() -> None:
    """As hiclr's, which grow stronger."""
    own = make_config("hiclr").method.views
    assert ViewOptions().recipe_for(own) == own
    with pytest.raises(UserError, match="--recipe weak-key gives 2 views of full size; this method needs 4 views"):
        ViewOptions(recipe="weak-key").recipe_for(own)


def test_a_method_with_small_crops_takes_any_number_of_them() -> None:
    own = RECIPES["swav"]
    for name in ("swav", "dino", "simclr"):
        assert ViewOptions(recipe=name).recipe_for(own) == RECIPES[name]
    single = replace(own[0], count=1), own[1]
    with pytest.raises(UserError, match="gives 2 views of full size; this method needs 1 views of full size and 6"):
        ViewOptions(recipe="simclr").recipe_for(single)
    with pytest.raises(UserError, match="gives 2 views of full size and 6 views of 43 %; this method needs 2 views"):
        ViewOptions(recipe="swav").recipe_for(RECIPES["simclr"])
