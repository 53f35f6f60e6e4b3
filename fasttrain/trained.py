"""What a run has trained: its encoder, with the weights of a checkpoint, and how images are prepared for it."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import torch
from torch import nn

from fasttrain.config import TrainConfig, load_config
from fasttrain.engine.networks import make_method
from fasttrain.input import located, pixel_statistics
from fasttrain.methods import Method
from fasttrain.networks.encoders import make_encoder
from fasttrain.run.checkpoint import BEST, UNFIT, Checkpoint, load_checkpoint, load_newest
from fasttrain.run.folder import DataRecord, read_data
from fasttrain.system.errors import UserError
from fasttrain.system.memory import is_full_memory
from fasttrain.views.draw import crop_fraction
from fasttrain.weights.preprocessing import Preprocessing


class Trained(NamedTuple):
    """encoder: the library's own module, plain batch norm, fp32, on the CPU, in evaluation mode; (N, 3, size, size) →
    (N, F). config: of its run. images: those it was trained on. digest: SHA-256 of the checkpoint. projector: the
    method's head on it, (N, F) → (N, D), in evaluation mode."""

    encoder: nn.Module
    preprocessing: Preprocessing
    config: TrainConfig
    images: DataRecord
    step: int
    digest: str
    projector: nn.Module


def load_trained(
    run: pathlib.Path, best: bool = False, checkpoint: pathlib.Path | None = None, method: str = "", data: str = "",
    arch: str = "",
) -> Trained:  # fmt: skip
    """The encoder of a run's newest checkpoint, of its best, or of one that is named.

    method, arch: of a run whose method or encoder is from outside, that. data: see images_of. Raises UserError and
    DataError.
    """
    config = load_config(run, method, arch)
    images, size = images_of(run, config, data), config.views.size
    found = chosen_checkpoint(run, config.run.checkpoint_every, best, checkpoint)
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
        built = make_method(config.method, config.encoder, size, config.run.seed)
        encoder, _ = make_encoder(config.encoder, size)
    load_weights(built, found)
    trained, projector = built.evaluated
    encoder.load_state_dict(trained.state_dict())
    preprocessing = Preprocessing(size, crop_fraction(size), images.mean, images.std)
    encoder, projector = (module.eval().requires_grad_(False) for module in (encoder, projector))
    return Trained(encoder, preprocessing, config, images, found.state["step"], found.digest, projector)


def load_encoder(
    run: str | os.PathLike[str], best: bool = False, checkpoint: str | os.PathLike[str] | None = None, method: str = "",
    data: str = "", arch: str = "",
) -> tuple[nn.Module, Preprocessing]:  # fmt: skip
    """A run's encoder and how images are prepared for it: (N, 3, size, size) → (N, F), as the library that it comes
    from makes it, with plain batch norm, fp32, on the CPU, frozen and in evaluation mode.

        encoder, preprocessing = load_encoder("runs/first")
        features = encoder(preprocessing.transform()(image)[None])

    run, best, checkpoint: the run folder's newest checkpoint, checkpoints/best.pt, or one that is named. method, data,
    arch: see load_trained. Raises UserError where there is none or it is another network's, RunError for a damaged one.
    """
    found = load_trained(
        pathlib.Path(run), best, None if checkpoint is None else pathlib.Path(checkpoint), method, data, arch
    )
    return found.encoder, found.preprocessing


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
    data = located(config.data.data)
    found = data if data.exists() or not given else located(given)
    return DataRecord(data.real, "", *pixel_statistics(found, config.data.loader))
