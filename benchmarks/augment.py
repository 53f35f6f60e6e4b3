#!/usr/bin/env python3
"""How fast views are made, beside the reference and what memory and arithmetic allow.

    python benchmarks/augment.py --data OUT

First the version for this device is compared with the reference on the same parameters, each operation alone and whole
recipes; where they differ too much the command says so and ends with status 1. Then every side makes MoCo-v2 pairs from
the same batches, in turn, so that none finds its input in a cache: CUDA events on a GPU, a clock on a CPU. Likewise
SwAV's multi-crop, two views and six small ones, all in one call or in a call for each size. Prints tables and appends
a line to benchmarks/results/augment.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch import Tensor

from benchmarks import record
from fasttrain.input import Batch, Order, ThreadLoader, open_dataset, pixel_statistics
from fasttrain.kernels.augment import DTYPES, Views, augment
from fasttrain.kernels.augment.table import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewTable
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.options import NotNegative, Options, Positive
from fasttrain.views import spec
from fasttrain.views.draw import draw
from fasttrain.views.spec import RECIPES, Recipe, ViewSpec

LEVEL = 1 / 255  # a step of a byte
MOST_MEAN, MOST_ANYWHERE = 1.0, 4.0  # levels a fast version may differ from the reference
COMPARED_AT_ONCE = 16  # images
REFERENCE_IMAGES = 8  # of a round: it takes one view at a time
COPY_BYTES = 2**28
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PAIR, MULTI_CROP = RECIPES["mocov2"], RECIPES["swav"]
_ALWAYS = ViewSpec(jitter_p=1, gray_p=1, blur_p=1, solarize_p=1)


@dataclass(frozen=True)
class AugmentBenchmark(Options):
    """Check and time how views are made. The last line of the output is JSON."""

    data: str
    """Converted data set or folder of images."""
    images: Positive[int] = 64
    """Images on which the versions are compared (the reference takes 0.1 s for each of them)."""
    batch: NotNegative[int] = 0
    """Images of a timed batch; 0 = 256 on a GPU, 32 on a CPU. Fewer where the data set has too few for all batches."""
    batches: Positive[int] = 4
    """Batches that take turns. Together they should exceed the caches."""
    size: Positive[int] = 224
    """Side of a view in pixels."""
    rounds: Positive[int] = 7
    """Rounds; in each, every side runs once through the batches."""


@dataclass(frozen=True)
class Difference:
    """How far views lie from the reference's, in levels of a byte."""

    mean: float
    most: float
    over: int  # values further than MOST_ANYWHERE, of which
    over_clipped: int  # where the reference is 0 or 1, so that one of the two may have been clipped
    clipped: int  # all values where it is 0 or 1
    values: int

    def __add__(self, other: Difference) -> Difference:
        values = self.values + other.values
        mean = (self.mean * self.values + other.mean * other.values) / values
        over, over_clipped = self.over + other.over, self.over_clipped + other.over_clipped
        return Difference(mean, max(self.most, other.most), over, over_clipped, self.clipped + other.clipped, values)


def only(table: ViewTable, **kept: Tensor) -> ViewTable:
    """The first views' crops, and of the rest what is given."""
    drawn = {name: column[:, :1] for name, column in vars(table).items()}
    neutral = {
        "flip_BV": torch.zeros_like(drawn["flip_BV"]),
        "order_BV4": torch.full_like(drawn["order_BV4"], -1),
        "gray_BV": torch.zeros_like(drawn["gray_BV"]),
        "sigma_BV": torch.zeros_like(drawn["sigma_BV"]),
        "solarize_BV": torch.zeros_like(drawn["solarize_BV"]),
    }
    return ViewTable(**(drawn | neutral | {name: column[:, :1] for name, column in kept.items()}))


def cases(batch: Batch, size: int) -> dict[str, ViewTable]:
    """A table for every operation alone, always applied, and for whole recipes."""
    drawn = functools.partial(
        draw, height_B=batch.height_B, width_B=batch.width_B, index_B=batch.index_B, seed=0, epoch=0, size=size
    )
    table = drawn((_ALWAYS,))
    colours = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
    alone = {
        name: only(table, order_BV4=torch.tensor([operation, -1, -1, -1], dtype=torch.int8).expand(len(batch), 1, 4))
        for name, operation in colours.items()
    }
    alone |= {
        "crop": only(table),
        "flip": only(table, flip_BV=torch.ones_like(table.flip_BV)),
        "gray": only(table, gray_BV=table.gray_BV),
        "blur": only(table, sigma_BV=table.sigma_BV),
        "solarize": only(table, solarize_BV=table.solarize_BV),
    }
    return alone | {name: drawn(RECIPES[name]) for name in ("mocov2", "mocov3")}


def difference(ours: Tensor, truth: Tensor) -> Difference:
    levels = (ours.float() - truth).abs() / LEVEL
    clipped, over = (truth <= 0) | (truth >= 1), ~(levels <= MOST_ANYWHERE)  # a NaN is over
    over_clipped = int((over & clipped).sum())
    mean, most = float(levels.double().mean()), float(levels.max())
    return Difference(mean, most, int(over.sum()), over_clipped, int(clipped.sum()), levels.numel())


def compare(batches: list[Batch], size: int, dtypes: Sequence[torch.dtype]) -> dict[str, dict[str, Difference]]:
    """The fast version's difference by output type and case. Raises RunError where it is too large."""
    found: dict[str, dict[str, Difference]] = {str(dtype)[6:]: {} for dtype in dtypes}
    for batch in batches:
        for name, table in cases(batch, size).items():
            sizes = (size,) * table.flip_BV.shape[1]
            inputs = (batch.pixels, batch.offset_B, batch.height_B, batch.width_B, table, sizes, *PLAIN)
            (truth,) = augment(*inputs, impl="reference")
            for dtype, so_far in zip(dtypes, found.values(), strict=True):
                here = difference(augment(*inputs, dtype=dtype)[0], truth)
                so_far[name] = so_far[name] + here if name in so_far else here
    for kind, by_case in found.items():
        title = f"levels from the reference, {kind}"
        print(f"{title:36}{'mean':>9}{'most':>9}{'over 4':>9}{'(clipped)':>11}{'all clipped':>13}")
        for name, d in by_case.items():
            share = d.clipped / d.values
            print(f"{name:36}{d.mean:9.4f}{d.most:9.4f}{d.over:9}{d.over_clipped:11}{share:13.2%}")
        wrong = [name for name, d in by_case.items() if not d.mean <= MOST_MEAN or d.over > d.over_clipped]
        if wrong:
            raise RunError(f"{kind} views differ from the reference by too much: {', '.join(wrong)}")
    return found


def load(path: pathlib.Path, count: int, per_batch: int, device: torch.device) -> list[Batch]:
    """The first `count` images in batches, each with pixels of its own on the device."""
    store = open_dataset(path, "train")
    if count > store.num_samples:
        raise UserError(f"{path} has {store.num_samples} images, {count} are asked for")
    loader = ThreadLoader(store, Order(store.num_samples, per_batch, shuffle=False), 2)
    batches: list[Batch] = []
    for batch in loader.epoch(0):
        batches.append(dataclasses.replace(batch, pixels=batch.pixels.to(device, copy=True)))
        if len(batches) * per_batch >= count:
            break
    loader.close()
    return batches


class Side:
    """One way to make a recipe's views: `run` goes once through its images and returns the seconds for each."""

    def __init__(
        self, batches: list[Batch], recipe: Recipe, size: int, make: Callable[..., Views], by_size: bool = False
    ) -> None:
        """make: `augment`, with what else it needs. by_size: a call for each size of views."""
        self._batches, self._make = batches, make
        sizes = spec.sides(recipe, size)
        calls = [[v for v, side in enumerate(sizes) if side == only] for only in dict.fromkeys(sizes)]
        self._calls = calls if by_size else [list(range(len(sizes)))]
        self._sizes = [tuple(sizes[v] for v in views) for views in self._calls]
        self._tables = [[_part(_drawn(batch, recipe, size), views) for views in self._calls] for batch in batches]
        self._views: list[Views | None] = [None for _ in self._calls]
        self.device = batches[0].pixels.device

    def run(self) -> float:
        seconds = timed(self._through, self.device)
        return seconds / sum(len(batch) for batch in self._batches)

    def _through(self) -> None:
        for b, tables in zip(self._batches, self._tables, strict=True):
            self._views = [
                self._make(b.pixels, b.offset_B, b.height_B, b.width_B, table, sizes, out=out)
                for table, sizes, out in zip(tables, self._sizes, self._views, strict=True)
            ]


def _first(batch: Batch, count: int) -> Batch:
    names = "offset_B", "height_B", "width_B", "index_B"
    columns = {name: getattr(batch, name)[:count] for name in names}
    return Batch(batch.pixels, **columns, label_B=None)


def _drawn(batch: Batch, recipe: Recipe, size: int) -> ViewTable:
    return draw(recipe, batch.height_B, batch.width_B, batch.index_B, seed=0, epoch=1, size=size)


def _part(table: ViewTable, views: list[int]) -> ViewTable:
    return ViewTable(**{name: column[:, views] for name, column in vars(table).items()})


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: on a GPU those of its kernels and copies, by events; else by the clock."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Events also count what the GPU waits for the host. While it sleeps, for 10 ms, the host gets ahead of it.
    torch.cuda._sleep(20_000_000)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def floor(batches: list[Batch], recipe: Recipe, size: int, itemsize: int) -> dict[str, float]:
    """Bytes and multiply-adds of an image's views at the least, and the seconds those bytes take in a plain copy here.

    Bytes: each crop read once, each view written once. Multiply-adds: both passes of the resize and of the blur, each
    with the taps it has; the colours come on top.
    """
    read = adds = 0.0
    size_V = torch.tensor(spec.sides(recipe, size)).double()
    for batch in batches:
        table = _drawn(batch, recipe, size)
        height, width = table.crop_BV4[..., 2:].double().unbind(-1)
        taps_y, taps_x = (2 * torch.clamp(side / size_V, min=1) for side in (height, width))
        blur = 2 * (2 * torch.ceil(3 * table.sigma_BV.double()) + 1) * (table.sigma_BV > 0)
        read += float((3 * height * width).sum())
        adds += float((3 * size_V * (width * taps_y + size_V * taps_x + size_V * blur)).sum())
    images = sum(len(batch) for batch in batches)
    moved = read / images + float((3 * size_V * size_V).sum()) * itemsize
    return {"bytes": moved, "multiply_adds": adds / images, "seconds": moved / copy_rate(batches[0].pixels.device)}


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy much larger than the caches."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def sides(batches: list[Batch], size: int, mean: tuple, std: tuple) -> tuple[dict[str, Side], dict[str, Side]]:
    """Name -> side, for pairs and for multi-crop. The reference makes few images, or it would take most of the time."""
    on_gpu = batches[0].pixels.is_cuda
    name = "triton" if on_gpu else "cpu"
    plain = functools.partial(augment, mean=mean, std=std)
    fp32, bf16 = (functools.partial(plain, impl=name, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    few = [_first(batches[0], REFERENCE_IMAGES)]
    pairs = {
        f"{name}, fp32": Side(batches, PAIR, size, fp32),
        f"{name}, bf16": Side(batches, PAIR, size, bf16),
        "reference": Side(few, PAIR, size, functools.partial(plain, impl="reference")),
    }
    if on_gpu:
        in_memory = [dataclasses.replace(batches[0], pixels=batches[0].pixels.cpu())]
        pairs["cpu, fp32"] = Side(in_memory, PAIR, size, functools.partial(plain, impl="cpu"))
    multi_crop = {
        f"{name}, bf16, one call": Side(batches, MULTI_CROP, size, bf16),
        f"{name}, bf16, a call for each size": Side(batches, MULTI_CROP, size, bf16, by_size=True),
    }
    return pairs, multi_crop


def benchmark(options: AugmentBenchmark) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    data, size = pathlib.Path(options.data), options.size
    available = open_dataset(data, "train").num_samples
    if options.batches > available:
        raise UserError(f"--batches {options.batches}: {data} has {available} images")
    torch.set_num_threads(1)  # the reference's operations are small; the fast version has threads of its own
    few = min(COMPARED_AT_ONCE, options.images)
    differences = compare(load(data, options.images, few, device), size, DTYPES)
    per_batch = min(options.batch or (256 if on_gpu else 32), available // options.batches)
    batches = load(data, per_batch * options.batches, per_batch, device)
    pairs, multi_crop = sides(batches, size, *pixel_statistics(data, "auto"))
    made = pairs | multi_crop
    taken: dict[str, list[float]] = {name: [] for name in made}
    for n in range(options.rounds + 1):
        for name, side in made.items():
            took = side.run()
            if n:  # the first compiles and warms up
                taken[name].append(took)
    seconds, crop_seconds = ({name: taken[name] for name in group} for group in (pairs, multi_crop))
    least, crop_least = (floor(batches, recipe, size, 2) for recipe in (PAIR, MULTI_CROP))
    fast, (together, apart) = next(iter(pairs)), crop_seconds.values()
    figures = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "most_levels": {kind: round(max(d.most for d in found.values()), 4) for kind, found in differences.items()},
        "us_per_pair": medians(seconds),
        "floor_us_per_pair": round(least["seconds"] * 1e6, 3),
        "vs_reference": round(statistics.median(seconds["reference"]) / statistics.median(seconds[fast]), 2),
        "us_per_multi_crop": medians(crop_seconds),
        "floor_us_per_multi_crop": round(crop_least["seconds"] * 1e6, 3),
        "one_call_vs_each_size": round(statistics.median(b / a for a, b in zip(together, apart, strict=True)), 3),
    }
    print(f"{options.batches} batches of {per_batch} images, views of {size} pixels")
    show("pair", seconds, least, per_batch)
    show(
        "multi-crop of " + " + ".join(f"{s.count} × {spec.sides((s,), size)[0]}" for s in MULTI_CROP),
        crop_seconds,
        crop_least,
        per_batch,
    )
    compared = {kind: {n: dataclasses.asdict(d) for n, d in found.items()} for kind, found in differences.items()}
    settings = {"size": size, "images": options.images, "batch": per_batch, "batches": options.batches}
    print(json.dumps(figures), flush=True)
    floors = {"floor": least, "floor_multi_crop": crop_least}
    record.append("augment", {**settings, **figures, **floors, "seconds": taken, "differences": compared})
    return 0


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Microseconds by side."""
    return {name: round(statistics.median(values) * 1e6, 3) for name, values in seconds.items()}


def show(what: str, seconds: dict[str, list[float]], least: dict[str, float], per_batch: int) -> None:
    print(f"{f'µs for a {what}':44}{'median':>9}{'least':>9}{'most':>9}{f'ms for {per_batch}':>12}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        micro = (f"{x * 1e6:9.1f}" for x in (middle, min(values), max(values)))
        print(f"{name:44}{''.join(micro)}{middle * per_batch * 1e3:12.3f}")
    word = f"floor: {least['bytes'] / 1e6:.2f} MB copied ({least['multiply_adds'] / 1e6:.0f} M multiply-adds)"
    print(f"{word:44}{least['seconds'] * 1e6:9.1f}{'':18}{least['seconds'] * per_batch * 1e3:12.3f}")


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: benchmark(parse(AugmentBenchmark, argv)))


if __name__ == "__main__":
    raise SystemExit(main())
