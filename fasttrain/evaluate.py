#!/usr/bin/env python3
"""Evaluate a run's encoder on labelled images it was not trained on: weighted kNN and a linear probe.

    python fasttrain/evaluate.py RUN --data OUT --knn --linear

The last line of the output is one JSON object; it is also kept as RUN/evaluation.json and shown in RUN/report.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from torch import nn

from fasttrain.config import TrainConfig, load_config
from fasttrain.engine.networks import laid_out, make_method
from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.features import EvenSubset, extract, open_labelled
from fasttrain.evaluation.knn import TEMPERATURE, knn, neighbours
from fasttrain.evaluation.linear_probe import linear_probe
from fasttrain.input import Store, open_dataset
from fasttrain.report import write_report
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.faults import explained
from fasttrain.run.folder import DataRecord
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import DataError, UserError
from fasttrain.system.options import Bounds, NotNegative, Options, Positive
from fasttrain.trained import chosen_checkpoint, images_of, load_weights


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Evaluate a run's newest checkpoint by weighted kNN and a linear probe on frozen features.

    Features of the data set's train split are the memory; its val split is classified. Without --knn or --linear both
    are done. The last line of the output is JSON. Exit status: 0 done, 2 bad input, 1 anything else.
    """

    run: str
    """Run folder; by place, or by --run."""
    data: str = ""
    """Labelled data set with train and val splits. Empty: the one the run was trained on, where it lay then."""
    method: str = ""
    """Only of a run whose method is from outside: that, package.module:Class, once more. What a run folder says is not
    enough to run code."""
    knn: bool = False
    """Weighted k-nearest-neighbour classification."""
    linear: bool = False
    """Linear classifier on the frozen features."""
    k: NotNegative[int] = 0
    """Neighbours of kNN. 0: a sixth of the mean number of a class's images, as 200 is of ImageNet's."""
    temperature: Positive[float] = TEMPERATURE
    """Temperature of the neighbours' votes, exp(similarity / temperature)."""
    features: Literal["encoder", "projection"] = "encoder"
    """What is compared: the encoder's output, or the projection head's (as MoCo's CIFAR-10 notebook does)."""
    best: bool = False
    """Evaluate checkpoints/best.pt, the best by training's --knn-every, instead of the newest checkpoint."""
    untrained: bool = False
    """Also evaluate the same network with the weights it started from; those figures end in _untrained."""
    batch_size: Positive[int] = 256
    """Images a step."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Decoding threads. auto: every core this process may use."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""


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
    config = load_config(run, options.method)
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


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(EvaluateConfig, argv, positional=True)
        with explained(f"lower --batch-size (now {options.batch_size}), or evaluate where there is more"):
            return evaluate(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
