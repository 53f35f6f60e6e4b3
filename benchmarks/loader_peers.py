"""The sides of the loader benchmark that are other projects', each as its users compose it, on the same files."""

from __future__ import annotations

import pathlib
import random
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter

from fasttrain.formats.beton import BetonReader
from fasttrain.formats.manifest import Manifest
from fasttrain.input import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

SCALE = (0.2, 1.0)
_MEAN_255, _STD_255 = (tuple(255 * x for x in values) for values in (IMAGENET_MEAN, IMAGENET_STD))


def extract(data: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the training streams of .beton shards as an image folder, byte for byte."""
    manifest = Manifest.load(data)
    for shard in manifest.splits["train"]:
        reader = BetonReader(data / shard.name)
        for i in range(reader.num_samples):
            start = int(reader.pointer_N[i])
            path = folder / f"class{reader.label_N[i]:04d}" / f"{shard.name}-{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.data[start : start + int(reader.size_N[i])].tobytes())


class Ffcv:
    """Stock FFCV, two views an image: its Loader gives a field one pipeline, so a pair takes two passes of one.

    Each pass decodes and crops every image and normalises it to float32, on all threads: two decodes a pair, and no
    contention between two loaders.
    """

    def __init__(self, data: pathlib.Path, threads: int, batch_size: int, size: int) -> None:
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor

        (shard,) = Manifest.load(data).splits["train"]
        mean, std = (np.array(values) for values in (_MEAN_255, _STD_255))
        image = [
            RandomResizedCropRGBImageDecoder((size, size), scale=SCALE), RandomHorizontalFlip(),
            NormalizeImage(mean, std, np.float32), ToTensor(),
        ]  # fmt: skip
        self._loader = Loader(
            str(data / shard.name), batch_size=batch_size, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
            drop_last=True, pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
        )  # fmt: skip

    def epoch(self, _n: int) -> int:
        return sum(len(images) for _ in range(2) for images, _ in self._loader) // 2


class Dali:
    """DALI on the CPU: one decode, then two crops, or two MoCo-v2 views as solo-learn composes them.

    solo-learn computes every operation for every image and keeps its result by a random factor of 0 or 1. The pipeline
    runs a batch when asked for it: what it computed ahead would count for it, and then slow the side that comes next.
    """

    def __init__(self, folder: pathlib.Path, threads: int, batch_size: int, full: bool, images: int, size: int) -> None:
        """images: how many an epoch() runs; the pipeline goes on where it was, so it never starts anew."""
        from nvidia.dali import Pipeline, fn, types

        self._steps, self._batch_size = max(1, images // batch_size), batch_size
        self._pipeline = Pipeline(
            batch_size=batch_size, num_threads=threads, device_id=None, seed=0, prefetch_queue_depth=1,
            exec_pipelined=False, exec_async=False, exec_dynamic=False,
        )  # fmt: skip
        with self._pipeline:
            jpegs, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
            image = fn.decoders.image(jpegs, device="cpu", output_type=types.DALIImageType.RGB)
            self._pipeline.set_outputs(*(_dali_view(fn, types, image, full, size) for _ in range(2)))
        self._pipeline.build()

    def epoch(self, _n: int) -> int:
        for _ in range(self._steps):
            self._pipeline.run()
        return self._steps * self._batch_size


def _dali_view(fn: ModuleType, types: ModuleType, image: DataNode, full: bool, size: int) -> DataNode:
    def either(probability: float, changed: DataNode, unchanged: DataNode) -> DataNode:
        chosen = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
        return chosen * changed + (chosen ^ True) * unchanged

    interpolation = types.INTERP_CUBIC if full else types.INTERP_LINEAR  # cubic is solo-learn's
    view = fn.random_resized_crop(image, size=size, random_area=SCALE, interp_type=interpolation)
    if full:
        uniform = fn.random.uniform
        jittered = fn.color_twist(
            view, brightness=uniform(range=[0.6, 1.4]), contrast=uniform(range=[0.6, 1.4]),
            saturation=uniform(range=[0.6, 1.4]), hue=uniform(range=[-36, 36]),
        )  # fmt: skip
        view = either(0.8, jittered, view)
        gray = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        view = either(0.2, fn.cat(gray, gray, gray, axis=2), view)
        view = either(0.5, fn.gaussian_blur(view, window_size=23, sigma=uniform(range=[0.1, 2.0])), view)
    return fn.crop_mirror_normalize(
        view, dtype=types.FLOAT, output_layout="CHW", mean=_MEAN_255, std=_STD_255, mirror=fn.random.coin_flip()
    )


class _Blur:
    """MoCo's own Gaussian blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class _TwoViews:
    """MoCo v2's transform, twice."""

    def __init__(self, size: int) -> None:
        from torchvision import transforms as T

        self._transform = T.Compose(
            [
                T.RandomResizedCrop(size, scale=SCALE),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([_Blur()], p=0.5),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [self._transform(image), self._transform(image)]


class Torchvision:
    """torchvision's ImageFolder in a DataLoader, as MoCo's own code does; its workers live on between epochs."""

    def __init__(self, folder: pathlib.Path, workers: int, batch_size: int, size: int) -> None:
        from torchvision.datasets import ImageFolder

        self._loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            ImageFolder(str(folder), _TwoViews(size)), batch_size=batch_size, shuffle=True, num_workers=workers,
            drop_last=True, persistent_workers=True, multiprocessing_context="spawn",
        )  # fmt: skip

    def epoch(self, _n: int) -> int:
        return sum(len(views[0]) for views, _ in self._loader)
