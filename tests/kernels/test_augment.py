"""The augmentation: the reference against torchvision's functions, the fast versions against the reference.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py), which computes bfloat16 wrongly.
"""

import io
import itertools
import os
import pathlib
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import ROOT
from support.forks import finished, succeed
from support.hopper import compiled_for_hopper
from torchvision.transforms.v2 import functional as T

from fasttrain.kernels.augment import DTYPES, augment, compiled, cpu, gpu
from fasttrain.kernels.augment.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewTable
from fasttrain.views.draw import center, draw
from fasttrain.views.spec import RECIPES, sides

SHAPES = ((50, 70), (33, 21), (128, 96), (1, 40), (57, 1))  # of the ragged batch's images
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"

# In levels of a byte: the output's rounding and, at 16 bits, the scratch's, which contrast may double.
# Required: mean 1, maximum 4.
TOLERANCE = {torch.float32: 0.05, torch.float16: 0.5, torch.bfloat16: 1.0}

interpreted = pytest.mark.skipif(not gpu.INTERPRETED, reason="not in Triton's interpreter")
VERSIONS = [
    pytest.param(("cpu", "cpu", torch.float32), id="cpu-fp32"),
    pytest.param(("triton", "cpu", torch.float32), id="interpreted-fp32", marks=interpreted),
    *(pytest.param(("triton", "cuda", dtype), id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in TOLERANCE),
]
HALF_VERSIONS = [
    pytest.param(("cpu", "cpu", torch.bfloat16), id="cpu-bf16"),
    pytest.param(("cpu", "cpu", torch.float16), id="cpu-fp16"),
    pytest.param(("triton", "cpu", torch.float16), id="interpreted-fp16", marks=interpreted),
]


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
    """Both finite and within `levels` of the 255 of a byte."""
    assert torch.isfinite(ours).all()
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() * 255 <= levels


# ---- the reference against torchvision


@pytest.mark.parametrize("size", [32, 63])
@pytest.mark.parametrize("crop", [(0, 0, 50, 70), (3, 5, 20, 17), (49, 69, 1, 1), (7, 0, 1, 70), (2, 2, 32, 63)])
@pytest.mark.parametrize("flip", [False, True])
def test_reference_crop_is_torchvisions(size: int, crop: tuple[int, int, int, int], flip: bool) -> None:
    image = picture(50, 70, 0)
    batch = pack([image])
    table = one_view(50, 70, crop_BV4=crop, flip_BV=flip)
    view = augment(*batch, table, (size,), *PLAIN, impl="reference")[0][0, 0]
    truth = T.resized_crop(image.permute(2, 0, 1).double() / 255, *crop, [size, size], antialias=True)
    assert_close(view, (T.horizontal_flip(truth) if flip else truth).float(), 0.01)


def test_reference_is_torchvisions_composition() -> None:
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
        assert_close(augment(*pack([image]), drawn, (63,), MEAN, STD, impl="reference")[0][0, 0], expected)


# ---- the fast versions against the reference


def slow(version: tuple) -> bool:
    """A tile takes Triton's interpreter tens of milliseconds."""
    return version[:2] == ("triton", "cpu")


def moved(table: ViewTable, device: str) -> ViewTable:
    return replace(table, **{name: column.to(device) for name, column in vars(table).items()})


def compare(version: tuple, batch: tuple[torch.Tensor, ...], table: ViewTable, size: int) -> None:
    impl, device, dtype = version
    sizes = (size,) * table.flip_BV.shape[1]
    (truth,) = augment(*batch, table, sizes, *PLAIN, impl="reference")
    poisoned = torch.full_like(truth, torch.nan, dtype=dtype, device=device)
    (ours,) = augment(batch[0].to(device), *batch[1:], table, sizes, *PLAIN, impl=impl, dtype=dtype, out=(poisoned,))
    assert ours.data_ptr() == poisoned.data_ptr()
    assert_close(ours.float().cpu(), truth, TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_scratch", lambda floats: np.full(floats, np.nan, dtype=np.float32))
    monkeypatch.setattr(
        gpu, "_scratch", lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype, device=device)
    )


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


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [32, 63])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(version: tuple[str, str, torch.dtype], name: str, size: int) -> None:
    gray = picture(50, 70, 1)[..., :1].expand(-1, -1, 3)  # has no hue
    primary = torch.eye(3, dtype=torch.uint8).mul(255).repeat(50, 24, 1)[:, :70]
    for image in (picture(50, 70, 0),) if slow(version) and size == 63 else (picture(50, 70, 0), gray, primary):
        compare(version, pack([image]), one_view(50, 70, **OPERATIONS[name]), size)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_operations_in_every_order(version: tuple[str, str, torch.dtype], order: tuple[int, ...]) -> None:
    compare(version, ragged(1), one_view(50, 70, order_BV4=order, strength_BV4=(1.4, 1.35, 0.6, -0.1)), 33)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("crop", [(0, 0, 128, 96), (127, 95, 1, 1), (0, 40, 128, 1), (5, 0, 1, 96), (90, 3, 33, 32)])
def test_crop(version: tuple[str, str, torch.dtype], crop: tuple[int, int, int, int]) -> None:
    for size, flip in ((32, False), (63, True), (7, True)):
        compare(version, pack([picture(128, 96, 2)]), one_view(128, 96, crop_BV4=crop, flip_BV=flip), size)


@pytest.mark.parametrize("version", VERSIONS)
def test_view_of_one_pixel(version: tuple[str, str, torch.dtype]) -> None:
    compare(version, pack([picture(9, 13, 2)]), one_view(9, 13, flip_BV=True, order_BV4=(CONTRAST, HUE, -1, -1)), 1)


@pytest.mark.parametrize("version", VERSIONS + HALF_VERSIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_on_a_ragged_batch(version: tuple[str, str, torch.dtype], name: str) -> None:
    """Each kind of view once. Drawn for 224 px, so that the blur is wider than these sizes would have it."""
    batch, recipe = ragged(), tuple(replace(spec, count=1) for spec in RECIPES[name])
    for epoch in range(1 if slow(version) else 4):
        for size in (63,) if slow(version) else (32, 63):
            compare(version, batch, draw(recipe, *batch[2:], torch.arange(len(SHAPES)), 1, epoch, 224), size)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"no photographs at {PHOTOGRAPHS}")
def test_recipe_on_photographs(version: tuple[str, str, torch.dtype]) -> None:
    photographs = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member in itertools.islice((m for m in archive if m.name.lower().endswith((".jpg", ".jpeg"))), 3):
            image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
            image.thumbnail((400, 400))
            photographs.append(torch.from_numpy(np.array(image)))
    batch = pack(photographs)
    compare(version, batch, draw(RECIPES["mocov2"], *batch[2:], torch.arange(3), 1, 0, 224), 96)


@pytest.mark.parametrize("version", VERSIONS)
def test_views_of_different_sizes(version: tuple[str, str, torch.dtype]) -> None:
    """Multi-crop: views of equal size come together, each as it would alone; earlier results are written again."""
    impl, device, dtype = version
    batch, index = ragged(3), torch.arange(3)
    recipe = RECIPES["mocov2"] * 2 + RECIPES["mocov3"][:1]
    table, sizes = draw(recipe, *batch[2:], index, seed=0, epoch=0, size=224), (33, 20, 33, 20, 20)
    inputs = (batch[0].to(device), *batch[1:], table, sizes, *PLAIN)
    big, small = augment(*inputs, impl=impl, dtype=dtype)
    assert big.shape == (2, 3, 3, 33, 33)
    assert small.shape == (3, 3, 3, 20, 20)
    for made, side, views in ((big, 33, (0, 2)), (small, 20, (1, 3, 4))):
        (truth,) = augment(*batch, table, (side,) * 5, *PLAIN, impl="reference")
        assert_close(made.float().cpu(), truth[list(views)], TOLERANCE[dtype])
    before = big.clone()
    again = augment(*inputs, impl=impl, dtype=dtype, out=(big.fill_(torch.nan), small))
    assert [group.data_ptr() for group in again] == [big.data_ptr(), small.data_ptr()]
    assert torch.equal(again[0], before)


@pytest.mark.parametrize("version", [*VERSIONS, *HALF_VERSIONS])
def test_one_call_for_all_sizes_makes_the_bits_of_a_call_for_each(version: tuple[str, str, torch.dtype]) -> None:
    """Whatever the sides: multiples of a vector or not, and smaller than one."""
    impl, device, dtype = version
    batch, sizes = ragged(3), (32, 20, 7, 32, 48, 7)
    if slow(version):
        batch, sizes = ragged(2), (20, 7, 20)
    recipe = (RECIPES["mocov2"] + RECIPES["mocov3"] + RECIPES["swav"])[: len(sizes)]
    recipe = tuple(replace(spec, count=1) for spec in recipe)
    table = draw(recipe, *batch[2:], torch.arange(len(batch[1])), 0, 0, 224)
    table = replace(table, sigma_BV=table.sigma_BV.clamp(max=2))  # a blur of 7 pixels reaches no further
    inputs, options = (batch[0].to(device), *batch[1:]), {"impl": impl, "dtype": dtype}
    made = augment(*inputs, table, sizes, MEAN, STD, **options)
    for group, side in zip(made, dict.fromkeys(sizes), strict=True):
        numbers = [v for v, other in enumerate(sizes) if other == side]
        part = ViewTable(**{name: column[:, numbers] for name, column in vars(table).items()})
        (alone,) = augment(*inputs, part, (side,) * len(numbers), MEAN, STD, **options)
        assert torch.equal(group, alone)


@pytest.mark.parametrize("version", VERSIONS)
def test_gray_before_the_jitter_is_torchvisions(version: tuple[str, str, torch.dtype]) -> None:
    """MoCo v1's order, in a table: gray is a saturation of 0 in the first place, which later operations find gray."""
    impl, device, dtype = version
    batch, spec = ragged(1), replace(RECIPES["mocov1"][0], gray_p=1.0, flip=0.0)
    order = draw((replace(spec, gray_first=False),), *batch[2:], torch.arange(1), 0, 0, 40)
    table = draw((spec,), *batch[2:], torch.arange(1), 0, 0, 40)
    (view,) = augment(batch[0].to(device), *batch[1:], table, (40,), *PLAIN, impl=impl, dtype=dtype)
    image = T.to_dtype(picture(*SHAPES[0], 0).permute(2, 0, 1), torch.float32, scale=True)
    truth = T.resized_crop(image, *table.crop_BV4[0, 0].tolist(), [40, 40], antialias=True)
    truth = T.rgb_to_grayscale(truth, 3)
    adjust = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    for operation in order.order_BV4[0, 0].tolist():
        truth = adjust[operation](truth, float(order.strength_BV4[0, 0, operation]))
    assert_close(view[0, 0].float().cpu(), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("version", [version for version in VERSIONS if version.id != "interpreted-fp32"])
def test_same_bits_every_time(version: tuple[str, str, torch.dtype]) -> None:
    impl, device, dtype = version
    batch = ragged()
    table = draw(RECIPES["mocov3"], *batch[2:], torch.arange(len(SHAPES)), 0, 0, 224)
    (first,), (second,) = (
        augment(batch[0].to(device), *batch[1:], table, (40, 40), MEAN, STD, impl=impl, dtype=dtype) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mocov3", "swav"])
def test_table_on_the_device_in_a_cuda_graph(name: str) -> None:
    """A captured call applies the table that is in its memory when it is replayed, and reads nothing back."""
    device, batch, index = "cuda", ragged(), torch.arange(len(SHAPES))
    recipe, sizes = RECIPES[name], sides(RECIPES[name], 40)
    tables = [draw(recipe, *batch[2:], index, seed=0, epoch=epoch, size=40) for epoch in range(2)]
    on_device = moved(tables[0], device)
    inputs = [column.to(device) for column in batch]
    out = augment(*inputs, on_device, sizes, *PLAIN)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        augment(*inputs, on_device, sizes, *PLAIN, out=out)
    for table in tables:
        for column in vars(table):
            getattr(on_device, column).copy_(getattr(table, column))
        for group in out:
            group.fill_(torch.nan)
        graph.replay()
        for group, truth in zip(out, augment(*batch, table, sizes, *PLAIN, impl="reference"), strict=True):
            assert_close(group.cpu(), truth)
    with pytest.raises(ValueError, match="graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        augment(inputs[0], *batch[1:], tables[0], sizes, *PLAIN, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mocov3", "swav"])
def test_nothing_waits_for_the_gpu(name: str) -> None:
    batch, sizes = ragged(), sides(RECIPES[name], 40)
    table = draw(RECIPES[name], *batch[2:], torch.arange(len(SHAPES)), seed=0, epoch=0, size=40)
    pixels = batch[0].cuda()
    on_device = [column.cuda() for column in batch[1:]], moved(table, "cuda")
    for columns, rows in ((batch[1:], table), on_device):
        augment(pixels, *columns, rows, sizes, MEAN, STD)
        torch.cuda.set_sync_debug_mode("error")
        try:
            augment(pixels, *columns, rows, sizes, MEAN, STD)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_kernels_compile_for_hopper(tmp_path: pathlib.Path) -> None:
    """Registers fit five blocks of 128 threads to a multiprocessor, and next to nothing is spilled."""
    kernels = compiled_for_hopper("augment", tmp_path)
    assert len(kernels) == 16
    for registers, stack, shared in kernels.values():
        assert registers <= 65536 // (128 * 5)
        assert stack <= 16
        assert shared <= 16384


def _specialisations() -> None:
    for dtypes, (count, size) in enumerate(((1, 8), (5, 17), (5, 17)), 1):
        batch = ragged(count)
        table = draw(RECIPES["cifar"], *batch[2:], torch.arange(count), 0, 0, size)
        for dtype in DTYPES[:dtypes]:
            augment(*batch, table, (size, size), *PLAIN, impl="cpu", dtype=dtype)
        assert len(compiled.make_views.signatures) == dtypes


def test_one_specialisation_serves_all_batches_of_a_dtype(tmp_path: pathlib.Path) -> None:
    """In a process of its own: others' tests leave theirs."""
    succeed([finished(tmp_path, _specialisations)])


@pytest.mark.parametrize("size", [8, 20, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_16_bit_output_is_the_nearest(size: int, dtype: torch.dtype) -> None:
    batch = ragged()
    table = draw(RECIPES["mocov3"], *batch[2:], torch.arange(len(SHAPES)), 0, 0, 224)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    full, half = (torch.full((2, len(SHAPES), size, size, 3), torch.nan, dtype=kind) for kind in (torch.float32, dtype))
    for out in (full, half):
        cpu.augment(*batch, table, mean, std, [([0, 1], out)])
    assert torch.equal(half, full.to(dtype))


def test_output_at_any_address() -> None:
    """Aligned outputs are written past the caches, others are not."""
    batch = ragged()
    table = draw(RECIPES["mocov2"], *batch[2:], torch.arange(len(SHAPES)), 0, 0, 224)
    memory = torch.full((len(SHAPES) * 2 * 32 * 32 * 3 + 32,), torch.nan)
    aligned = -memory.data_ptr() % 64 // 4
    views = []
    for start in (aligned, aligned + 1):
        out_VBSS3 = memory[start : start + len(memory) - 32].view(2, len(SHAPES), 32, 32, 3)
        cpu.augment(*batch, table, torch.tensor(MEAN), torch.tensor(STD), [([0, 1], out_VBSS3)])
        views.append(out_VBSS3.clone())
    assert torch.isfinite(views[0]).all()
    assert torch.equal(*views)


# ---- the public function


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu", pytest.param("triton", marks=interpreted)])
def test_layout_normalisation_and_reused_output(impl: str) -> None:
    batch = ragged()
    table, sizes = draw(RECIPES["mocov3"], *batch[2:], torch.arange(len(SHAPES)), 0, 0, 224), (20, 20)
    (views,) = augment(*batch, table, sizes, MEAN, STD, impl=impl)
    assert views.shape == (2, 5, 3, 20, 20)
    assert views.dtype == torch.float32
    for images in (views[0], views[1], views.flatten(0, 1)):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.untyped_storage().data_ptr() == views.untyped_storage().data_ptr()
    (plain,) = augment(*batch, table, sizes, *PLAIN, impl=impl)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(views, (plain - mean) / std, atol=1e-5)
    (again,) = augment(*batch, table, sizes, MEAN, STD, impl=impl, out=(plain,))
    assert again.data_ptr() == plain.data_ptr()
    assert torch.equal(again, views)
    with pytest.raises(ValueError, match="earlier result"):
        augment(*batch, table, sizes, MEAN, STD, impl=impl, out=(torch.empty(2, 5, 3, 20, 20),))


def test_empty_batch() -> None:
    batch = tuple(column[:0] for column in ragged())
    table = draw(RECIPES["swav"], *batch[2:], torch.arange(0), seed=0, epoch=0, size=8)
    big, small = augment(*batch, table, sides(RECIPES["swav"], 8), *PLAIN)
    assert (big.shape, small.shape) == ((2, 0, 3, 8, 8), (6, 0, 3, 3, 3))


def test_works_in_a_forked_child() -> None:
    batch, table = pack([picture(9, 9, 0)]), one_view(9, 9)
    (parents,) = augment(*batch, table, (8,), *PLAIN, impl="cpu")
    child = os.fork()
    if child == 0:  # the parent's threads do not exist here
        os._exit(0 if torch.equal(augment(*batch, table, (8,), *PLAIN, impl="cpu")[0], parents) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_unknown_or_unavailable_impl_names_the_choices() -> None:
    batch, table = pack([picture(9, 9, 0)]), one_view(9, 9)
    with pytest.raises(ValueError, match=r"float64.*float16"):
        augment(*batch, table, (8,), *PLAIN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"triton.*meta.*reference"):
        augment(batch[0].to("meta"), *batch[1:], table, (8,), *PLAIN, impl="triton")
    with pytest.raises(ValueError, match=r"table lies on meta"):
        augment(*batch, moved(table, "meta"), (8,), *PLAIN)
    with pytest.raises(ValueError, match=r"2 sizes for 1 views"):
        augment(*batch, table, (8, 8), *PLAIN)
    with pytest.raises(ValueError, match=r"earlier result"):
        augment(*batch, table, (8,), *PLAIN, out=())
    with pytest.raises(ValueError, match=r"fast.*auto, reference, cpu"):
        augment(*batch, table, (8,), *PLAIN, impl="fast")
    with pytest.raises(ValueError, match=r"cpu.*meta.*reference"):
        augment(batch[0].to("meta"), *batch[1:], table, (8,), *PLAIN, impl="cpu")


@pytest.mark.parametrize(
    "crop",
    [(-1, 0, 4, 4), (0, -1, 4, 4), (0, 0, 10, 9), (0, 4, 9, 6), (0, 0, 0, 3), (3, 3, 3, 0)],
)
def test_crop_outside_the_image(crop: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="image 0, view 0 has a crop outside"):
        augment(*pack([picture(9, 9, 0)]), one_view(9, 9, crop_BV4=crop), (8,), *PLAIN)


def test_other_impossible_tables_and_batches() -> None:
    pixels, offset_B, height_B, width_B = pack([picture(9, 9, 0)])
    for fields, message in (
        ({"order_BV4": (0, 4, 1, 2)}, "unknown colour"), ({"order_BV4": (1, 0, 1, 2)}, "contrast twice"),
        ({"sigma_BV": -0.5}, "blur"), ({"sigma_BV": 2.5}, "blur"),
        ({"sigma_BV": float("nan")}, "blur"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            augment(pixels, offset_B, height_B, width_B, one_view(9, 9, **fields), (8,), *PLAIN)
    two = {name: column.expand(-1, 2, *column.shape[2:]) for name, column in vars(one_view(9, 9, sigma_BV=2.0)).items()}
    with pytest.raises(ValueError, match="image 0, view 1 has a blur"):
        augment(pixels, offset_B, height_B, width_B, ViewTable(**two), (8, 4), *PLAIN)
    for offset in (-1, 20):
        with pytest.raises(ValueError, match="image 0 does not lie within"):
            augment(pixels, offset_B * 0 + offset, height_B, width_B, one_view(9, 9), (8,), *PLAIN)


def test_as_many_threads_as_cores_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {2, 3, 5})
    assert cpu._threads() == 3
