"""What evaluate.py evaluates: runs, and the images that each is evaluated on."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from typing import NamedTuple

from fasttrain.config import TrainConfig, load_config
from fasttrain.evaluation.features import open_labelled
from fasttrain.input import Place, Selection, located, open_dataset
from fasttrain.jobs.options import EvaluateConfig
from fasttrain.run.checkpoint import Checkpoint
from fasttrain.run.folder import DataRecord
from fasttrain.system.errors import DataError, UserError
from fasttrain.trained import chosen_checkpoint, images_of


class Labelled(NamedTuple):
    """A data set to be classified. variant: of its figures, "" for the run's own images."""

    place: Place
    train: Selection
    val: Selection
    variant: str

    @property
    def fingerprint(self) -> str:
        """Of the images of both splits."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.val.fingerprint}".encode()).hexdigest()


class Subject(NamedTuple):
    """A run to be evaluated: what it was, its images' statistics, and what it is evaluated on."""

    run: pathlib.Path
    config: TrainConfig
    images: DataRecord
    checkpoint: Checkpoint
    sets: list[Labelled]


def open_subject(run: pathlib.Path, options: EvaluateConfig) -> Subject:
    """Raises UserError and DataError."""
    config = load_config(run, options.method, options.arch)
    images = images_of(run, config, options.data)
    cache = options.elsewhere.after(config.data.elsewhere)
    data = located(options.data or images.path, cache)
    if not options.data and not data.exists():
        raise UserError(f"{data.real}, the images that {run} was trained on, are not there now: --data tells where")
    sets = [Labelled(data, *open_splits(data, images, config), "")]
    for other in (located(other, cache) for other in options.transfer):
        sets.append(Labelled(other, *open_labelled(other, "auto", config.views.size), f"on_{other.stem}"))
        if sets[-1].variant in (before.variant for before in sets[:-1]):
            raise UserError(f"--transfer names two data sets {other.stem}, and their figures would be, too: rename one")
    checkpoint = chosen_checkpoint(run, config.run.checkpoint_every, options.best)
    needed = {name: part for name, part in checkpoint.state.items() if name in ("step", "method")}
    checkpoint = checkpoint._replace(state=needed)  # of all runs, in memory at once
    return Subject(run, config, images, checkpoint, sets)


def open_splits(data: Place, images: DataRecord, config: TrainConfig) -> tuple[Selection, Selection]:
    """Train and val of a data set. The run's own images, wherever they lie by now, are cut as the run cut them."""
    options, size = config.data, config.views.size
    own = data.real == images.path
    if options.val_fraction and not own:
        with contextlib.suppress(UserError, DataError):  # others, that can't be cut like this
            train = open_dataset(data, "train", options.loader, size, options.val_fraction)
            own = train.fingerprint == images.fingerprint
    loader, val_fraction = (options.loader, options.val_fraction) if own else ("auto", 0.0)
    return open_labelled(data, loader, size, val_fraction=val_fraction)


def check_same_images(subjects: list[Subject]) -> None:
    """Raises UserError for runs that are evaluated on different images: a mean over these says nothing."""
    first = subjects[0]
    for other in subjects[1:]:
        if other.sets[0].fingerprint != first.sets[0].fingerprint:
            raise UserError(
                f"{first.run} and {other.run} are of different images, {first.sets[0].place.real} and "
                f"{other.sets[0].place.real}, "
                "and their figures have no mean: evaluate them one by one, or both on the same --data"
            )
