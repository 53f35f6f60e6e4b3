"""Evaluate a run's encoder on labelled images it was not trained on: weighted kNN and a linear probe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

from torch import nn

from fasttrain.config import TrainConfig, load_config
from fasttrain.engine.networks import laid_out, make_method
from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.features import EvenSubset, extract, open_labelled
from fasttrain.evaluation.knn import knn, neighbours
from fasttrain.evaluation.linear_probe import linear_probe
from fasttrain.input import Store, open_dataset
from fasttrain.jobs.options import EvaluateConfig
from fasttrain.jobs.report import write_report
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.folder import DataRecord
from fasttrain.system.errors import DataError, UserError
from fasttrain.trained import chosen_checkpoint, images_of, load_weights


def open_splits(data: pathlib.Path, images: DataRecord, config: TrainConfig) -> tuple[EvenSubset, EvenSubset]:
    """Train and val of a data set. The run's own images, wherever they lie by now, are cut as the run cut them."""
    options, size = config.data, config.views.size
    own = str(data) == images.path
    if options.val_fraction and not own:
        with contextlib.suppress(UserError, DataError):  # others, that can't be cut like this
            train = open_dataset(data, "train", options.loader, size, options.val_fraction)
            own = train.fingerprint == images.fingerprint
    loader, val_fraction = (options.loader, options.val_fraction) if own else ("auto", 0.0)
    return open_labelled(data, loader, size, val_fraction=val_fraction)


def evaluate(options: EvaluateConfig) -> int:
    """Print and keep the figures; returns the exit status."""
    run = pathlib.Path(options.run)
    config = load_config(run, options.method, options.arch)
    images, size = images_of(run, config, options.data), config.views.size
    data = pathlib.Path(os.path.realpath(options.data or images.path))
    if not options.data and not data.exists():
        raise UserError(f"{data}, the images that this run was trained on, are not there now: --data tells where")
    train, val = open_splits(data, images, config)
    checkpoint = chosen_checkpoint(run, config.run.checkpoint_every, options.best)
    ranks = Ranks(options.device)
    device, classes = ranks.device, len(train.classes)
    method = make_method(config.method, config.encoder, size, config.run.seed)
    encoder, projector = method.evaluated
    network = encoder if options.features == "encoder" else nn.Sequential(encoder, projector)

    protocols = [name for name in ("knn", "linear") if getattr(options, name)] or ["knn", "linear"]
    found: list[Evaluation] = []
    for untrained in (True, False) if options.untrained else (False,):
        if not untrained:
            load_weights(method, checkpoint)
        laid_out(method, device, config.optimisation.precision).eval()
        memory, queries = (
            extract(
                network, store, run, device, size=size, mean=images.mean, std=images.std,
                batch_size=options.batch_size, workers=ranks.threads(options.workers),
                max_failed_fraction=config.data.max_failed_fraction,
            )
            for store in (train, val)
        )  # fmt: skip
        for protocol in protocols:
            settings: dict[str, Any] = {"features": options.features}
            if protocol == "knn":
                settings |= {"k": neighbours(memory.label_N, options.k), "temperature": options.temperature}
                predicted_N = knn(memory, queries, classes, settings["k"], options.temperature, device)
            else:
                predicted_N = linear_probe(memory, queries, classes, device)
            of = protocol, checkpoint.state["step"], untrained, settings, str(data), fingerprint(train, val)
            found.append(Evaluation(*of, len(queries.label_N), *accuracy(predicted_N, queries.label_N)))
    figures = {name: value for each in found for name, value in each.figures().items()}
    # First, as what follows may find the disk full.
    print(json.dumps({"step": checkpoint.state["step"], **figures}), flush=True)
    keep_evaluations(run, found)
    write_report(run)
    ranks.close()
    return 0


def fingerprint(train: Store, val: Store) -> str:
    """Of the images of both splits."""
    return hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()
