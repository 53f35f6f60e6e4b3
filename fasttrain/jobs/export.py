"""Write a run's encoder for another library, and compare features of the run's images before it says done."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasttrain import __version__
from fasttrain.evaluation.features import EvenSubset, central_views
from fasttrain.input import Batch, Store, open_dataset
from fasttrain.jobs.options import ExportConfig
from fasttrain.system.durable import publish, read_json, temporary_path, write_json
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.trained import Trained, load_trained
from fasttrain.weights.exported import Format, Loaded, Source
from fasttrain.weights.formats import FORMATS

IMAGES = 16  # that are compared
AT_ONCE = 5  # of them, so that the last batch is smaller: the number of images must not be fixed
TOLERANCE = 1e-5  # of Difference.relative
BESIDE = "preprocessing.json"  # in a folder; beside a file, FILE.json
MARK = "fasttrain"  # in that JSON: which version has written it


class Difference(NamedTuple):
    """Of features read back from the encoder's: relative is the largest over the images of ‖a − b‖ / ‖a‖, absolute the
    largest of one feature."""

    relative: float
    absolute: float


def export(options: ExportConfig) -> int:
    """Write, read again, compare, and only then give the file its name; returns the exit status."""
    made, path = FORMATS[options.to], pathlib.Path(os.path.abspath(options.file))
    _check_packages(options.to, made)
    beside = path / BESIDE if made.folder else path.parent / f"{path.name}.json"
    _check_replaceable(path, beside)
    trained = load_trained(pathlib.Path(options.run), options.best, method=options.method, data=options.data)
    views, pictures = some_images(trained, options.data)
    source = Source(trained.encoder, trained.config.encoder, trained.preprocessing)
    with _in_the_making(path) as temporary:
        told = {MARK: __version__, "to": options.to, "arch": source.options.arch, "step": trained.step}
        told |= {"checkpoint": trained.digest, "preprocessing": trained.preprocessing.as_json()}
        with _by_others(options.to):
            told |= made.write(source, temporary)
            loaded = made.load(source, temporary)
            found = difference(source, loaded, views)
        if not found.relative <= TOLERANCE:
            raise RunError(
                f"{options.file} is not written: features by {loaded.by} differ by {found.relative:.1e} of their norm, "
                f"more than {TOLERANCE:g}"
            )
        write_json(temporary / BESIDE if made.folder else temporary.with_name(beside.name), told)
        _publish(temporary, path)
    figures = {
        "file": options.file, "to": options.to, "step": trained.step, "tensors": len(source.encoder.state_dict()),
        "checked_by": loaded.by, "images": len(views), "difference": found.relative, "largest": found.absolute,
    }  # fmt: skip
    print(json.dumps(figures | prepared(source, loaded, views, pictures)), flush=True)
    return 0


@torch.no_grad()
def difference(source: Source, loaded: Loaded, views: Tensor) -> Difference:
    """Of the features of views (N, 3, size, size). Raises RunError for an encoder that has no features to compare."""
    own = source.encoder(views)
    other = torch.cat([loaded.features(few) for few in views.split(AT_ONCE)])
    if own.shape != other.shape:
        raise RunError(f"features by {loaded.by} are {tuple(other.shape)}, the encoder's {tuple(own.shape)}")
    norm_N = own.norm(dim=1)
    if not own.isfinite().all() or not norm_N.all():
        raise RunError("the encoder gives features that are 0 or no numbers, which can't be compared")
    apart = own - other
    return Difference(float((apart.norm(dim=1) / norm_N).max()), float(apart.abs().max()))


@torch.no_grad()
def prepared(source: Source, loaded: Loaded, views: Tensor, pictures: list[Image.Image]) -> dict[str, float]:
    """How far the library's own preparation of the images is from the run's: mean difference in levels of 0 to 255,
    and what that does to features, as Difference.relative."""
    if loaded.transform is None:
        return {}
    theirs = torch.stack([loaded.transform(picture) for picture in pictures])
    levels = (theirs - views).abs() * (255 * torch.tensor(source.preprocessing.std)[:, None, None])
    own, moved = source.encoder(views), source.encoder(theirs)
    apart = (own - moved).norm(dim=1) / own.norm(dim=1)
    return {"preprocessing_levels": float(levels.mean()), "preprocessing_difference": float(apart.mean())}


def some_images(trained: Trained, given: str) -> tuple[Tensor, list[Image.Image]]:
    """Views (N, 3, size, size) of a few of a run's images, evenly spread and always the same, and the images whole.

    given: where they lie now; "" where they did. Raises UserError and DataError where there are none.
    """
    size, _, mean, std = trained.preprocessing
    store = EvenSubset(_open(trained, given), IMAGES)
    found: list[Tensor] = []
    pictures: list[Image.Image] = []
    for batch, views in central_views(
        store, torch.device("cpu"), size=size, mean=mean, std=std, batch_size=IMAGES, workers=1,
        max_failed_fraction=trained.config.data.max_failed_fraction,
    ):  # fmt: skip
        found.append(views.clone())
        pictures += [_picture(batch, number) for number in range(len(batch))]
    return torch.cat(found), pictures


def _open(trained: Trained, given: str) -> Store:
    """The val split of the images, or the train split where there is none."""
    path, options = pathlib.Path(given or trained.images.path), trained.config.data
    if not path.exists():
        raise UserError(f"{path}, the images to compare features of, are not there now: --data tells where")
    with contextlib.suppress(DataError):
        return open_dataset(path, "val", view_size=trained.preprocessing.size)
    loader = "auto" if given else options.loader
    return open_dataset(path, "train", loader, trained.preprocessing.size)


def _picture(batch: Batch, number: int) -> Image.Image:
    first, height, width = (int(each[number]) for each in (batch.offset_B, batch.height_B, batch.width_B))
    pixels = batch.pixels[first : first + height * width * 3].numpy().reshape(height, width, 3)
    return Image.fromarray(np.array(pixels))


def _check_packages(to: str, made: Format) -> None:
    for name in made.packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--to {to} needs the package {name}: pip install '.[export]'")


def _check_replaceable(path: pathlib.Path, beside: pathlib.Path) -> None:
    """Raises UserError where something lies that is no earlier export."""
    there = [each for each in (path, beside) if os.path.lexists(each)]
    with contextlib.suppress(OSError, ValueError):
        content = read_json(beside)
        if isinstance(content, dict) and MARK in content:
            return
    if there:
        raise UserError(f"{there[0]} exists, and is no earlier export: choose another name")


@contextlib.contextmanager
def _in_the_making(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Its name in a folder beside it, which is gone afterwards with what is left there."""
    folder = temporary_path(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _by_others(to: str) -> Iterator[None]:
    """Whatever another library finds wrong is one line, and what it remarks on none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except (UserError, RunError, OSError):
        raise
    except Exception as error:
        raise RunError(f"--to {to}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.disable(before)


def _publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Give every file that was made its name, the JSON that tells of the others last."""
    folder = temporary.parent
    for file in sorted(folder.rglob("*"), key=lambda file: file.suffix == ".json" and file.name != "config.json"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            place = path.parent / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            publish(file, place)
