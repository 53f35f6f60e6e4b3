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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasttrain import __version__
from fasttrain.evaluation.features import central_views
from fasttrain.input import Batch, Store, evenly, located, open_dataset
from fasttrain.input.options import CacheOptions
from fasttrain.jobs.options import ExportConfig
from fasttrain.run.folder import config_of
from fasttrain.system.durable import publish, read_json, temporary_path, write_json
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.trained import Trained, load_trained
from fasttrain.weights.comparison import difference, prepared
from fasttrain.weights.exported import Format, Source
from fasttrain.weights.formats import FORMATS

IMAGES = 16  # that are compared
TOLERANCE = 1e-5  # of Difference.relative: other kernels round to 3e-6 at most, half precision to 8e-4
BESIDE = "preprocessing.json"  # in a folder; beside a file, FILE.json
MARK = "fasttrain"  # in that JSON: which version has written it


def export(options: ExportConfig) -> int:
    """Write, read again, compare, and only then give the file its name; returns the exit status."""
    made, path = FORMATS[options.to], pathlib.Path(os.path.abspath(options.file))
    _check_packages(options.to, made)
    config_of(pathlib.Path(options.run))  # first, for one who has exchanged the two
    beside = path / BESIDE if made.folder else path.parent / f"{path.name}.json"
    _check_replaceable(path, beside)
    trained = load_trained(
        pathlib.Path(options.run), options.best, method=options.method, data=options.data, arch=options.arch
    )
    views, pictures = some_images(trained, options.data)
    source = Source(trained.encoder, trained.config.encoder, trained.preprocessing)
    told = {MARK: __version__, "to": options.to, "arch": source.options.arch, "step": trained.step}
    told |= {"checkpoint": trained.digest, "preprocessing": trained.preprocessing.as_json()}
    with _in_the_making(path) as temporary:
        with _by_others(options.to):
            told |= made.write(source, temporary)
            loaded = made.load(source, temporary)
            found, shown = difference(source, loaded, views), prepared(source, loaded, views, pictures)
        if not found.relative <= TOLERANCE:
            raise RunError(
                f"{options.file} is not written: features by {loaded.by} differ by {found.relative:.1e} of their norm, "
                f"more than {TOLERANCE:g}"
            )
        write_json(temporary.parent / beside.relative_to(path.parent), told)
        _publish(temporary.parent, path.parent, beside)
    figures = {"difference": found.relative, "largest": found.absolute, **shown}
    result = {
        "file": options.file, "to": options.to, "step": trained.step, "tensors": len(source.encoder.state_dict()),
        "checked_by": loaded.by, "images": len(views), **{name: float(f"{x:.2e}") for name, x in figures.items()},
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return 0


def some_images(trained: Trained, given: str) -> tuple[Tensor, list[Image.Image]]:
    """Views (N, 3, size, size) of a few of a run's images, evenly spread and always the same, and the images whole.

    given: where they lie now; "" where they did. Raises UserError and DataError where there are none.
    """
    size, _, mean, std = trained.preprocessing
    store = evenly(_open(trained, given), IMAGES)
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
    options = trained.config.data
    place = located(given or trained.images.path, CacheOptions().after(options.elsewhere))
    if not place.exists():
        raise UserError(f"{place}, the images to compare features of, are not there now: --data tells where")
    with contextlib.suppress(DataError):
        return open_dataset(place, "val", view_size=trained.preprocessing.size)
    loader = "auto" if given else options.loader
    return open_dataset(place, "train", loader, trained.preprocessing.size)


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


def _publish(made: pathlib.Path, folder: pathlib.Path, last: pathlib.Path) -> None:
    """Give every file in `made` its name in a folder, the one that tells of the others last."""
    names = [file.relative_to(made) for file in made.rglob("*") if file.is_file()]
    for name in sorted(names, key=lambda name: folder / name == last):
        with open(made / name, "rb") as file:
            os.fsync(file.fileno())
        (folder / name).parent.mkdir(exist_ok=True)
        publish(made / name, folder / name)
