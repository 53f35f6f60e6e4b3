"""What a run has trained: its encoder, with the weights of a checkpoint, and how images are prepared for it."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

from torch import nn

from fasttrain.config import TrainConfig, load_config
from fasttrain.engine.networks import make_method
from fasttrain.evaluation.features import crop_fraction
from fasttrain.input import pixel_statistics
from fasttrain.methods import Method
from fasttrain.networks.encoders import make_encoder
from fasttrain.run.checkpoint import BEST, UNFIT, Checkpoint, load_checkpoint, load_newest
from fasttrain.run.folder import DataRecord, read_data
from fasttrain.system.errors import UserError
from fasttrain.system.memory import is_full_memory
from fasttrain.weights.preprocessing import Preprocessing


class Trained(NamedTuple):
    """encoder: the library's own module, plain batch norm, fp32, on the CPU, in evaluation mode; (N, 3, size, size) →
    (N, F). config: of its run. images: those it was trained on. digest: SHA-256 of the checkpoint."""

    encoder: nn.Module
    preprocessing: Preprocessing
    config: TrainConfig
    images: DataRecord
    step: int
    digest: str


def load_trained(
    run: pathlib.Path, best: bool = False, checkpoint: pathlib.Path | None = None, method: str = "", data: str = ""
) -> Trained:
    """The encoder of a run's newest checkpoint, of its best, or of one that is named.

    method: of a run whose method is from outside, that. data: see images_of. Raises UserError and DataError.
    """
    config = load_config(run, method)
    images, size = images_of(run, config, data), config.views.size
    found = chosen_checkpoint(run, config.run.checkpoint_every, best, checkpoint)
    built = make_method(config.method, config.encoder, size, config.run.seed)
    load_weights(built, found)
    encoder, _ = make_encoder(config.encoder, size)
    encoder.load_state_dict(built.evaluated[0].state_dict())
    preprocessing = Preprocessing(size, crop_fraction(size), images.mean, images.std)
    return Trained(
        encoder.eval().requires_grad_(False), preprocessing, config, images, found.state["step"], found.digest
    )


def chosen_checkpoint(
    run: pathlib.Path, checkpoint_every: int, best: bool = False, checkpoint: pathlib.Path | None = None
) -> Checkpoint:
    """The newest of a run, its best, or the one that is named. Raises UserError where there is none, and says how to
    get one."""
    if checkpoint and best:
        raise UserError(f"--best and --checkpoint {checkpoint} are two checkpoints: choose one")
    if checkpoint:
        return load_checkpoint(checkpoint)
    path = run / "checkpoints" / BEST
    if best and not path.exists():
        raise UserError(f"{run} has no {BEST}: train with --knn-every, for one epoch of that many at least")
    found = load_checkpoint(path) if best else load_newest(run / "checkpoints")
    if found is None:
        raise UserError(
            f"{run} has no checkpoint yet: training writes one every {checkpoint_every} steps, at its end, and "
            "when it is told to stop; if it has failed, its last line said why: run the same command again"
        )
    return found


def load_weights(method: Method, checkpoint: Checkpoint) -> None:
    """Give the method a checkpoint's weights. Raises UserError where they are of other networks."""
    try:
        method.load_state_dict(checkpoint.state["method"])
    except UNFIT as error:
        if is_full_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint.path} does not fit the networks of its run's config.json: {reason}") from error


def images_of(run: pathlib.Path, config: TrainConfig, given: str) -> DataRecord:
    """The run's images, and the statistics that belong to it. Raises UserError and DataError.

    given: where to look for the statistics of a run that ended before they were recorded, if its images are gone.
    """
    if recorded := read_data(run):
        return recorded
    data = pathlib.Path(config.data.data)
    found = data if data.exists() or not given else pathlib.Path(given)
    return DataRecord(os.path.realpath(data), "", *pixel_statistics(found, config.data.loader))
