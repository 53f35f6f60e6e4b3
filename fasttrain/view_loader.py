"""The decoded batches and their views in anyone's loop, with the images, order and views that training has.

for epoch in range(loader.epoch, 100):
    for (x, y), labels, index in loader:
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.engine.views import ViewMemory, make_views, on_device
from fasttrain.input import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_FAILED_FRACTION,
    Loader,
    Order,
    Place,
    Store,
    choose_shuffle,
    located,
    open_dataset,
    open_loader,
    pixel_statistics,
    seems_labelled,
)
from fasttrain.input.options import CacheOptions
from fasttrain.kernels.augment import DTYPES
from fasttrain.system.cores import machine_size, usable_cores
from fasttrain.system.errors import UserError, note
from fasttrain.views.spec import RECIPES, Recipe, sides

LOADERS = ("auto", "ffcv", "dali", "folder", "resident")
CENTER = "center"  # the one view that encoders are evaluated on, beside the recipes
_SAME = {"seed": "seed", "batch_size": "batch size", "data": "data"}  # of a position, besides epoch and step


class ViewBatch(NamedTuple):
    """B images of a ViewLoader. Its tensors are the caller's own: no later batch overwrites them.

    views: a tensor (B, 3, S, S) for each view, in the recipe's order; normalised, channels-last, on the loader's
    device. label_B: int64, beside them, −1 for an image without; None where labels are not read. index_B: int64,
    places of the images in the data set, on the CPU.
    """

    views: tuple[Tensor, ...]
    label_B: Tensor | None
    index_B: Tensor


class ViewLoader:
    """Batches of views of a data set, without end: each loop over it goes to the end of a pass over the images.

    Which images a batch has follows from (seed, epoch, step) alone, and their views from (seed, epoch, image): not from
    threads, processes, devices or restarts. The position belongs to the loader: a loop that was left early is taken up
    where it was left, by the next one or, with state_dict, by another process or number of them. Without shuffle each
    loop begins with the first image, unless load_state_dict says otherwise.
    """

    def __init__(
        self, data: str | os.PathLike[str] | Store, views: str | Recipe = "mocov2", size: int = 224,
        batch_size: int = 256, *, split: str = "train", shuffle: bool | Literal["global", "block"] = True,
        shuffle_window: int = 64, seed: int = 0, rank: int | None = None, world_size: int | None = None,
        device: str | torch.device = "auto", dtype: torch.dtype = torch.float32, mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None, labels: bool | None = None, loader: str = "auto",
        workers: int | Literal["auto"] = "auto", max_failed_fraction: float = MAX_FAILED_FRACTION,
        cache: str | os.PathLike[str] = "", cache_gb: float = 100.0,
    ) -> None:  # fmt: skip
        """Open the data; nothing is decoded before the first loop, but with loader="resident".

        data: what --data of training takes, or what open_dataset returns. views: a recipe's name, a tuple of ViewSpec
        of your own, or "center", the central crop that encoders are evaluated on. size: side of a view in pixels; of
        views of several sizes the largest. batch_size: images of all processes together, of which each gets its share.
        shuffle: a new order for each pass, whose images that fill no batch are left out; False: the data's own order,
        and a last batch that may be smaller. True shuffles as training does by default, "global" and "block" as its
        --shuffle does, "block" over shuffle_window shards at a time.
        rank, world_size: None: those of torch.distributed, or of torchrun, or a single process. device: where the views
        are; "auto": this process's current GPU where there is one. dtype: float32, bfloat16 or float16. mean, std: of
        the channels, in 0…1; None: the data set's own, ImageNet's for image files and an opened data set. labels:
        None: where there are some. loader, workers, max_failed_fraction, cache, cache_gb: as the options of training.

        Raises UserError for values that can't be, DataError for data that can't be read.
        """
        self.size, self.batch_size, self.seed = _positive("size", size), _positive("batch_size", batch_size), seed
        self.rank, self.world_size = _place(rank, world_size)
        self.device, self.dtype, self.recipe = _device(device), dtype, _recipe(views)
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype}: choose one of {', '.join(map(str, DTYPES))}")
        if loader not in LOADERS:
            raise UserError(f"loader {loader!r}: choose one of {', '.join(LOADERS)}")
        if not (isinstance(seed, int) and 0 <= seed < 2**64):
            raise UserError(f"seed {seed}: give a whole number, at least 0 and below 2^64")
        statistics: tuple[Sequence[float], Sequence[float]] = IMAGENET_MEAN, IMAGENET_STD
        place, kind = None, _kind(shuffle)
        if isinstance(data, str | os.PathLike):
            place = located(data, CacheOptions(os.fspath(cache), cache_gb))
            statistics = pixel_statistics(place, loader)
            data = open_dataset(place, split, loader, size)
        self.mean = _channels("mean", statistics[0] if mean is None else mean)
        self.std = _channels("std", statistics[1] if std is None else std)
        self.classes, self.num_samples, self._fingerprint = data.classes, data.num_samples, data.fingerprint
        self._check_batches(bool(shuffle))
        self._shuffle = bool(shuffle)
        read_labels = bool(data.classes) and seems_labelled(data) if labels is None else labels
        lanes, block_S, reason = choose_shuffle(data, place, kind, _positive("shuffle_window", shuffle_window))
        if reason:
            note(reason)
        order = Order(data.num_samples, batch_size, seed, self._shuffle, self.rank, self.world_size, lanes, block_S)
        threads = _workers() if workers == "auto" else _positive("workers", workers)
        self._loader = open_loader(data, order, threads, loader, self.device, max_failed_fraction, read_labels)
        self._batches: Any = None  # of the loop that is under way
        self._memory = ViewMemory() if self.device.type == "cpu" else None
        self._end = weakref.finalize(self, _close, self._loader, place)

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self._loader.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The pass that the next batch belongs to, from 0."""
        return self._position()[0]

    def __iter__(self) -> Iterator[ViewBatch]:
        """The batches up to the end of the pass. A loop that was left early is over by this.

        Raises LoaderError, a RunError, where more than max_failed_fraction of the images can't be decoded, or none is
        for a minute.
        """
        if not self._end.alive:
            raise UserError("this ViewLoader is closed")
        self._leave(self._batches)
        epoch = self.epoch
        self._batches = self._loader.epoch(epoch)
        return self._loop(self._batches, epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the batch that was handed out last, for torch.save; it does not depend on the ranks."""
        epoch, step = self._position()
        return {"epoch": epoch, "step": step, "lanes": self._loader.state_dict()["lanes"], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a loop that is under way is over by this. Raises UserError for what is no position, and for
        one among other batches than this loader's."""
        missing = {"epoch", "step", *_SAME} - state.keys()
        position: dict[str, int] = {name: state[name] for name in ("epoch", "step", "lanes") if name in state}
        if missing or not all(isinstance(value, int) and value >= 0 for value in position.values()):
            raise UserError(f"this is no position of a ViewLoader: {str(state)[:300]}")
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise UserError(
                    f"the position is one in batches of another {_SAME[name]} ({state[name]}; this loader's: {mine})"
                )
        self._leave(self._batches)
        if self._shuffle and "lanes" not in position:
            note("an earlier version was at this position: from here on images come in another order")
        self._loader.load_state_dict({"lanes": 0, **position})

    def close(self) -> None:
        """End its threads and free its memory. So does the end of the last reference to it."""
        self._leave(self._batches)
        self._end()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _position(self) -> tuple[int, int]:
        """Epoch and step of the next batch. A loader counts the place behind an epoch's last one to that epoch."""
        at = self._loader.state_dict()
        passes, step = divmod(at["step"], len(self))
        return at["epoch"] + passes, step

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch_size, "data": self._fingerprint}

    def _loop(self, batches: Any, epoch: int) -> Iterator[ViewBatch]:  # noqa: ANN401
        try:
            yield from iter(functools.partial(self._next, batches, epoch), None)  # so that none is kept here
            if batches is not self._batches:
                raise UserError("this loop has ended: another one over its ViewLoader has begun, or it was set back")
        finally:
            self._leave(batches)

    def _leave(self, batches: Any) -> None:  # noqa: ANN401
        """End a loop, if it is the one that is under way."""
        if batches is None or batches is not self._batches:
            return
        batches.close()
        self._batches = None
        if not self._shuffle:
            self._loader.load_state_dict({"epoch": self.epoch, "step": 0})

    def _next(self, batches: Any, epoch: int) -> ViewBatch | None:  # noqa: ANN401
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            if (batch := next(batches, None)) is None:
                return None
            size_V = sides(self.recipe, self.size) if self.recipe else (self.size,)
            out = self._memory.borrow(size_V, len(batch), self.dtype) if self._memory else None
            groups = make_views(batch, self.recipe, self.size, self.seed, epoch, self.mean, self.std, self.dtype, out)
            of_side = {group.shape[-1]: iter(group) for group in groups}
            views = tuple(next(of_side[side]) for side in size_V)
            return ViewBatch(views, on_device(batch.label_B, self.device), batch.index_B)

    def _check_batches(self, shuffle: bool) -> None:
        size, count, processes = self.batch_size, self.num_samples, self.world_size
        if size > count:
            raise UserError(f"batch_size {size} is larger than the data set ({count} images)")
        if size % processes:
            raise UserError(f"batch_size {size} is for all {processes} processes, and no multiple of them")
        if not shuffle and count % size % processes:
            raise UserError(
                f"without shuffle, the last batch of {count % size} images can't be shared equally by {processes} "
                "processes: with rank=0 and world_size=1 each of them reads all images"
            )


def _recipe(views: str | Recipe) -> Recipe:
    if not isinstance(views, str):
        if not views:
            raise UserError("views: give one ViewSpec at least")
        return tuple(views)
    if views != CENTER and views not in RECIPES:
        raise UserError(f"views {views!r}: choose one of {', '.join(RECIPES)}, {CENTER}, or give a tuple of ViewSpec")
    return () if views == CENTER else RECIPES[views]


def _kind(shuffle: bool | str) -> str:
    """As --shuffle has it; an order without shuffle has nothing to choose."""
    if isinstance(shuffle, str) and shuffle not in ("global", "block"):
        raise UserError(f"shuffle {shuffle!r}: choose one of True, False, global, block")
    return shuffle if isinstance(shuffle, str) else "auto" if shuffle else "global"


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's place: as given, as torch.distributed has it, or as torchrun will."""
    if (rank is None) != (world_size is None):
        raise UserError(f"rank {rank} and world_size {world_size}: give both, or neither")
    if rank is None or world_size is None:
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is outside 0…{world_size - 1}")
    return rank, world_size


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device!r}: views are made on a CPU, or on a GPU that PyTorch sees here")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _workers() -> int:
    """This process's share of the cores, of which torchrun's processes on a machine may all use the same."""
    return max(1, usable_cores() // machine_size())


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} {value!r}: give a whole number above 0")
    return value


def _channels(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3 or not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
        raise UserError(f"{name} {values}: give three numbers, of R, G and B" + (", above 0" if name == "std" else ""))
    return tuple(map(float, values))


def _close(loader: Loader, place: Place | None) -> None:
    loader.close()
    if place:
        place.close()
