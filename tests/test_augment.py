"""The augmentation: the reference against torchvision's functions, the compiled version against the reference."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as T

from fasttrain.views import BRIGHTNESS, CONTRAST, HUE, RECIPES, SATURATION, ViewTable, center, draw
from kernels.augment import augment, compiled, cpu

SHAPES = ((50, 70), (33, 21), (128, 96), (1, 40), (57, 1))  # of the ragged batch's images
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """(height, width, 3) uint8: smooth waves of every hue, with noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    waves = np.sin(y / (5 + random.uniform(0, 9, 3)) + x / (5 + random.uniform(0, 9, 3)) + random.uniform(0, 6, 3))
    return torch.from_numpy((127 + 100 * waves + random.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8))


def pack(pictures: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """pixels, offset_B, height_B, width_B of a batch, with bytes of no image before, between and after."""
    gap = torch.full((5,), 255, dtype=torch.uint8)
    pixels = torch.cat([gap, *(part for image in pictures for part in (image.flatten(), gap))])
    lengths = torch.tensor([image.numel() + 5 for image in pictures])
    height_B, width_B = (torch.tensor([image.shape[k] for image in pictures], dtype=torch.int32) for k in (0, 1))
    return pixels, lengths.cumsum(0) - lengths + 5, height_B, width_B


def ragged(count: int = len(SHAPES)) -> tuple[torch.Tensor, ...]:
    return pack([picture(*shape, seed) for seed, shape in enumerate(SHAPES[:count])])


def one_view(height: int, width: int, **fields: object) -> ViewTable:
    """A table for one image: the whole image, untouched, but for the given fields (unbatched values)."""
    size_B = (torch.tensor([height], dtype=torch.int32), torch.tensor([width], dtype=torch.int32))
    table = replace(center(*size_B, 1.0), crop_BV4=torch.tensor([[[0, 0, height, width]]], dtype=torch.int32))
    given = {name: torch.tensor([[value]], dtype=getattr(table, name).dtype) for name, value in fields.items()}
    return replace(table, **given)


def assert_close(ours: torch.Tensor, truth: torch.Tensor, levels: float = 0.05) -> None:
    """Both finite and within `levels` of the 255 of a byte. (Required: mean 1, maximum 4; rounding gives far less.)"""
    assert torch.isfinite(ours).all()
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() * 255 <= levels


# ---- the reference against torchvision


@pytest.mark.parametrize("size", [32, 63])
@pytest.mark.parametrize("crop", [(0, 0, 50, 70), (3, 5, 20, 17), (49, 69, 1, 1), (7, 0, 1, 70), (2, 2, 32, 63)])
@pytest.mark.parametrize("flip", [False, True])
def test_reference_crop_is_torchvisions(size, crop, flip):
    image = picture(50, 70, 0)
    batch = pack([image])
    view = augment(*batch, one_view(50, 70, crop_BV4=crop, flip_BV=flip), size, *PLAIN, impl="reference")[0, 0]
    truth = T.resized_crop(image.permute(2, 0, 1).double() / 255, *crop, [size, size], antialias=True)
    assert_close(view, (T.horizontal_flip(truth) if flip else truth).float(), 0.01)


def test_reference_is_torchvisions_composition():
    image = picture(50, 70, 0)
    table = one_view(
        50, 70, crop_BV4=(4, 6, 40, 50), flip_BV=True, order_BV4=(HUE, CONTRAST, SATURATION, BRIGHTNESS),
        strength_BV4=(1.3, 0.7, 1.4, -0.08), sigma_BV=1.3, solarize_BV=True,
    )  # fmt: skip
    truth = T.resized_crop(T.to_dtype(image.permute(2, 0, 1), torch.float32, scale=True), 4, 6, 40, 50, [63, 63])
    truth = T.adjust_contrast(T.adjust_hue(truth, -0.08), 0.7)
    truth = T.adjust_brightness(T.adjust_saturation(truth, 1.4), 1.3)
    for gray in (False, True):
        colours = T.rgb_to_grayscale(truth, 3) if gray else truth
        blurred = T.gaussian_blur(colours, [9, 9], [1.3, 1.3])
        expected = T.normalize(T.solarize(T.horizontal_flip(blurred), 0.5), list(MEAN), list(STD))
        drawn = replace(table, gray_BV=torch.tensor([[gray]]))
        assert_close(augment(*pack([image]), drawn, 63, MEAN, STD, impl="reference")[0, 0], expected)


# ---- the compiled version against the reference


def compare(batch: tuple[torch.Tensor, ...], table: ViewTable, size: int) -> None:
    truth = augment(*batch, table, size, *PLAIN, impl="reference")
    poisoned = torch.full_like(truth, torch.nan)
    ours = augment(*batch, table, size, *PLAIN, impl="cpu", out=poisoned)
    assert ours.data_ptr() == poisoned.data_ptr()
    assert_close(ours, truth)


@pytest.fixture
def poisoned_scratch(monkeypatch):
    monkeypatch.setattr(cpu, "_scratch", lambda floats: np.full(floats, np.nan, dtype=np.float32))


OPERATIONS = {
    "none": {},
    "flip": {"flip_BV": True},
    "darker": {"order_BV4": (BRIGHTNESS, -1, -1, -1), "strength_BV4": (0.6, 1, 1, 0)},
    "brighter": {"order_BV4": (-1, BRIGHTNESS, -1, -1), "strength_BV4": (1.8, 1, 1, 0)},
    "less contrast": {"order_BV4": (-1, -1, CONTRAST, -1), "strength_BV4": (1, 0.3, 1, 0)},
    "more contrast": {"order_BV4": (-1, -1, -1, CONTRAST), "strength_BV4": (1, 1.9, 1, 0)},
    "less saturation": {"order_BV4": (SATURATION, -1, -1, -1), "strength_BV4": (1, 1, 0.0, 0)},
    "more saturation": {"order_BV4": (SATURATION, -1, -1, -1), "strength_BV4": (1, 1, 1.9, 0)},
    "hue": {"order_BV4": (HUE, -1, -1, -1), "strength_BV4": (1, 1, 1, 0.1)},
    "hue half a turn": {"order_BV4": (HUE, -1, -1, -1), "strength_BV4": (1, 1, 1, 0.5)},
    "hue half a turn back": {"order_BV4": (HUE, -1, -1, -1), "strength_BV4": (1, 1, 1, -0.5)},
    "gray": {"gray_BV": True},
    "blur 0.1": {"sigma_BV": 0.1},
    "blur 2": {"sigma_BV": 2.0},
    "blur, gray, solarize": {"sigma_BV": 0.9, "gray_BV": True, "solarize_BV": True},
    "solarize": {"solarize_BV": True},
}


@pytest.mark.parametrize("size", [32, 63])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_operation(name, size, poisoned_scratch):
    gray = picture(50, 70, 1)[..., :1].expand(-1, -1, 3)  # has no hue
    primary = torch.eye(3, dtype=torch.uint8).mul(255).repeat(50, 24, 1)[:, :70]
    for image in (picture(50, 70, 0), gray, primary):
        compare(pack([image]), one_view(50, 70, **OPERATIONS[name]), size)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_compiled_operations_in_every_order(order):
    compare(ragged(1), one_view(50, 70, order_BV4=order, strength_BV4=(1.4, 1.35, 0.6, -0.1)), 33)


@pytest.mark.parametrize("crop", [(0, 0, 128, 96), (127, 95, 1, 1), (0, 40, 128, 1), (5, 0, 1, 96), (90, 3, 33, 32)])
def test_compiled_crop(crop, poisoned_scratch):
    for size, flip in ((32, False), (63, True), (1, False)):
        compare(pack([picture(128, 96, 2)]), one_view(128, 96, crop_BV4=crop, flip_BV=flip), size)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [32, 63])
def test_compiled_recipe_on_a_ragged_batch(name, size):
    batch = ragged()
    for epoch in range(4):
        compare(batch, draw(RECIPES[name], *batch[2:], torch.arange(len(SHAPES)), seed=1, epoch=epoch), size)


def test_one_specialisation_serves_all():
    for count, size in ((1, 8), (5, 17)):
        batch = ragged(count)
        augment(*batch, draw(RECIPES["cifar"], *batch[2:], torch.arange(count), 0, 0), size, *PLAIN, impl="cpu")
    assert len(compiled.make_views.signatures) == 1


@pytest.mark.parametrize("size", [8, 20, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_16_bit_output_is_the_nearest(size, dtype):
    batch = ragged()
    table = draw(RECIPES["mocov3"], *batch[2:], torch.arange(len(SHAPES)), seed=0, epoch=0)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    full, half = (torch.full((2, len(SHAPES), size, size, 3), torch.nan, dtype=kind) for kind in (torch.float32, dtype))
    for out in (full, half):
        cpu.augment(*batch, table, mean, std, out)
    assert torch.equal(half, full.to(dtype))


def test_output_at_any_address():
    """Aligned outputs are written past the caches, others are not."""
    batch = ragged()
    table = draw(RECIPES["mocov2"], *batch[2:], torch.arange(len(SHAPES)), seed=0, epoch=0)
    memory = torch.full((len(SHAPES) * 2 * 32 * 32 * 3 + 32,), torch.nan)
    aligned = -memory.data_ptr() % 64 // 4
    views = []
    for start in (aligned, aligned + 1):
        out_VBSS3 = memory[start : start + len(memory) - 32].view(2, len(SHAPES), 32, 32, 3)
        cpu.augment(*batch, table, torch.tensor(MEAN), torch.tensor(STD), out_VBSS3)
        views.append(out_VBSS3.clone())
    assert torch.isfinite(views[0]).all()
    assert torch.equal(*views)


# ---- the public function


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_layout_normalisation_and_reused_output(impl):
    batch = ragged()
    table = draw(RECIPES["mocov3"], *batch[2:], torch.arange(len(SHAPES)), seed=0, epoch=0)
    views = augment(*batch, table, 20, MEAN, STD, impl=impl)
    assert views.shape == (5, 2, 3, 20, 20)
    assert views.dtype == torch.float32
    for v in range(2):
        assert views[:, v].is_contiguous(memory_format=torch.channels_last)
    plain = augment(*batch, table, 20, *PLAIN, impl=impl)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(views, (plain - mean) / std, atol=1e-5)
    again = augment(*batch, table, 20, MEAN, STD, impl=impl, out=plain)
    assert again.data_ptr() == plain.data_ptr()
    assert torch.equal(again, views)
    with pytest.raises(ValueError, match="earlier result"):
        augment(*batch, table, 20, MEAN, STD, impl=impl, out=torch.empty(5, 2, 3, 20, 20))


def test_empty_batch():
    batch = tuple(column[:0] for column in ragged())
    table = draw(RECIPES["cifar"], *batch[2:], torch.arange(0), seed=0, epoch=0)
    assert augment(*batch, table, 8, *PLAIN).shape == (0, 2, 3, 8, 8)


def test_works_in_a_forked_child():
    batch, table = pack([picture(9, 9, 0)]), one_view(9, 9)
    parents = augment(*batch, table, 8, *PLAIN, impl="cpu")
    child = os.fork()
    if child == 0:  # the parent's threads do not exist here
        os._exit(0 if torch.equal(augment(*batch, table, 8, *PLAIN, impl="cpu"), parents) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_unknown_or_unavailable_impl_names_the_choices():
    batch, table = pack([picture(9, 9, 0)]), one_view(9, 9)
    with pytest.raises(ValueError, match=r"fast.*auto, reference, cpu"):
        augment(*batch, table, 8, *PLAIN, impl="fast")
    with pytest.raises(ValueError, match=r"cpu.*meta.*reference"):
        augment(batch[0].to("meta"), *batch[1:], table, 8, *PLAIN, impl="cpu")


@pytest.mark.parametrize(
    "crop",
    [(-1, 0, 4, 4), (0, -1, 4, 4), (0, 0, 10, 9), (0, 4, 9, 6), (0, 0, 0, 3), (3, 3, 3, 0)],
)
def test_crop_outside_the_image(crop):
    with pytest.raises(ValueError, match="image 0, view 0 has a crop outside"):
        augment(*pack([picture(9, 9, 0)]), one_view(9, 9, crop_BV4=crop), 8, *PLAIN)


def test_other_impossible_tables_and_batches():
    pixels, offset_B, height_B, width_B = pack([picture(9, 9, 0)])
    for fields, message in (
        ({"order_BV4": (0, 4, 1, 2)}, "unknown colour"), ({"sigma_BV": -0.5}, "blur"), ({"sigma_BV": 2.5}, "blur"),
        ({"sigma_BV": float("nan")}, "blur"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            augment(pixels, offset_B, height_B, width_B, one_view(9, 9, **fields), 8, *PLAIN)
    for offset in (-1, 20):
        with pytest.raises(ValueError, match="image 0 does not lie within"):
            augment(pixels, offset_B * 0 + offset, height_B, width_B, one_view(9, 9), 8, *PLAIN)


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for ranks, threads in (("1", 8), ("2", 4), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cpu._threads() == threads
