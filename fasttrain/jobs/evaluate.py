"""Evaluate runs' encoders on labelled images they were not trained on, by the protocols of the papers."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fasttrain import __version__
from fasttrain.config import TrainConfig, load_config
from fasttrain.engine.networks import initialise, make_method
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.evaluation.accuracy import accuracy, per_class
from fasttrain.evaluation.extraction import extract_on_all
from fasttrain.evaluation.features import Preparation, open_labelled
from fasttrain.evaluation.over_features import over_features
from fasttrain.evaluation.over_images import over_images
from fasttrain.evaluation.ranking import Ranked
from fasttrain.evaluation.representation import keep_representation
from fasttrain.input import Selection, open_dataset
from fasttrain.jobs.init import weights_started_from
from fasttrain.jobs.options import EvaluateConfig
from fasttrain.jobs.report import write_report
from fasttrain.jobs.scratch import Scratch
from fasttrain.methods import Method
from fasttrain.networks.encoders import make_encoder
from fasttrain.run.checkpoint import Checkpoint
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.folder import DataRecord
from fasttrain.system.errors import DataError, UserError, printable
from fasttrain.system.options import Settings
from fasttrain.trained import chosen_checkpoint, images_of, load_weights

PATIENCE = datetime.timedelta(days=1)  # that a rank has with others whose share takes longer
SPLITS = "train", "val"
SEED = 0  # of what is drawn, so that all runs are compared by the same images and first heads


class Labelled(NamedTuple):
    """A data set to be classified. variant: of its figures, "" for the run's own images."""

    path: pathlib.Path
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


def evaluate(options: EvaluateConfig) -> int:
    """Print and keep the figures; returns the exit status."""
    options = with_protocols(options)
    runs = [pathlib.Path(run) for run in options.run]
    if not runs:
        raise UserError("RUN is missing: the folder of a run, or of several")
    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise UserError("a run is named twice: figures of several are means over different seeds")
    subjects = [open_subject(run, options) for run in runs]  # all of them, before anything is computed
    with given_back():
        ranks = Ranks(options.device, PATIENCE)
        figures, failed = [], None
        for subject in subjects:
            keys = [
                key_of(subject, options, *part, ranks) for part in itertools.product(weights(options), subject.sets)
            ]
            with Scratch(subject.run, keys, ranks) as scratch:
                figures.append(list(measure(subject, options, ranks, scratch)))
                if ranks.is_main:
                    try:
                        keep_evaluations(subject.run, figures[-1])
                        write_report(subject.run)
                    except (OSError, UserError) as error:  # a full disk must not cost the figures: printed below
                        failed = failed or error
        if ranks.is_main:
            print(json.dumps(summary(figures)), flush=True)
            if failed:
                raise failed
        ranks.close()
    return 0


def summary(figures: list[list[Evaluation]]) -> dict[str, Any]:
    """The last line: a run's figures, or the means over runs and, as NAME_std, their standard deviations; and the
    settings of each protocol."""
    by_name: dict[str, list[float]] = {}
    for evaluation in (each for of_run in figures for each in of_run):
        for name, value in evaluation.figures().items():
            by_name.setdefault(name, []).append(value)
    steps = sorted({each.step for of_run in figures for each in of_run})
    line: dict[str, Any] = {"step": steps[0] if len(steps) == 1 else steps}
    if len(figures) > 1:
        line["runs"] = len(figures)
    for name, values in by_name.items():
        line[name] = round(statistics.fmean(values), 2)
        if len(figures) > 1:
            line[f"{name}_std"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
    line["protocol"] = {each.name: each.settings for each in figures[0]}
    return line


def open_subject(run: pathlib.Path, options: EvaluateConfig) -> Subject:
    """Raises UserError and DataError."""
    config = load_config(run, options.method, options.arch)
    images = images_of(run, config, options.data)
    data = pathlib.Path(os.path.realpath(options.data or images.path))
    if not options.data and not data.exists():
        raise UserError(f"{data}, the images that {run} was trained on, are not there now: --data tells where")
    sets = [Labelled(data, *open_splits(data, images, config), "")]
    for other in map(pathlib.Path, options.transfer):
        splits = open_labelled(other, "auto", config.views.size)
        sets.append(Labelled(pathlib.Path(os.path.realpath(other)), *splits, f"on_{other.resolve().name}"))
    checkpoint = chosen_checkpoint(run, config.run.checkpoint_every, options.best)
    return Subject(run, config, images, checkpoint, sets)


def open_splits(data: pathlib.Path, images: DataRecord, config: TrainConfig) -> tuple[Selection, Selection]:
    """Train and val of a data set. The run's own images, wherever they lie by now, are cut as the run cut them."""
    options, size = config.data, config.views.size
    own = str(data) == images.path
    if options.val_fraction and not own:
        with contextlib.suppress(UserError, DataError):  # others, that can't be cut like this
            train = open_dataset(data, "train", options.loader, size, options.val_fraction)
            own = train.fingerprint == images.fingerprint
    loader, val_fraction = (options.loader, options.val_fraction) if own else ("auto", 0.0)
    return open_labelled(data, loader, size, val_fraction=val_fraction)


def weights(options: EvaluateConfig) -> tuple[bool, ...]:
    """Which of a run's weights are evaluated, one after the other: are they the untrained ones?"""
    return (True, False) if options.untrained else (False,)


def measure(subject: Subject, options: EvaluateConfig, ranks: Ranks, scratch: Scratch) -> Iterator[Evaluation]:
    """Every figure that is asked for of a run."""
    step = subject.checkpoint.state["step"]
    for untrained in weights(options):
        method = network_of(subject, untrained).to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        method.eval().requires_grad_(False)
        for labelled in subject.sets:
            folder = scratch.folder(key_of(subject, options, untrained, labelled, ranks))
            for found in protocols(subject, options, method, labelled, untrained, ranks, folder):
                classes = labelled.train.classes
                figures = accuracy(found.ranked_Nr, found.label_N, len(classes), found.draws)
                evaluation = Evaluation(
                    found.protocol, step, untrained, found.settings, str(labelled.path), labelled.fingerprint,
                    len(found.label_N) // found.draws, **figures._asdict(),
                    variant="_".join(filter(None, (labelled.variant, found.variant))),
                    per_class=per_class(found.ranked_Nr, found.label_N, classes),
                )  # fmt: skip
                if ranks.is_main:
                    print(printable(said(evaluation)), file=sys.stderr, flush=True)
                yield evaluation
            if ranks.is_main:  # features of the next take as much room; what was trained on images stays
                for split in SPLITS:
                    shutil.rmtree(folder / split, ignore_errors=True)


def said(evaluation: Evaluation) -> str:
    """A figure and how it was measured, for people."""
    figures = {"top-1": evaluation.top1, "top-5": evaluation.top5, "balanced": evaluation.balanced}
    texts = [f"{name} {value:.2f}" for name, value in figures.items() if value is not None]
    texts[0] += f" % (95 %: {evaluation.low:.2f} to {evaluation.high:.2f})"
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in evaluation.settings.items())
    name = f"{evaluation.name}, untrained" if evaluation.untrained else evaluation.name
    return f"{name}: {', '.join(texts)}, majority {evaluation.majority:.2f}; {settings}"


def network_of(subject: Subject, untrained: bool) -> Method:
    """The run's networks with the weights of its checkpoint, or those that it started from. Raises UserError."""
    config = subject.config
    method = make_method(config.method, config.encoder, config.views.size, config.run.seed)
    if not untrained:
        load_weights(method, subject.checkpoint)
    elif config.encoder.init:
        initialise(method, weights_started_from(subject.run, config, method.encoder))
    return method


def key_of(
    subject: Subject, options: EvaluateConfig, untrained: bool, labelled: Labelled, ranks: Ranks
) -> dict[str, Any]:
    """What features follow from."""
    return {
        "weights": "untrained" if untrained else subject.checkpoint.digest, "fingerprint": labelled.fingerprint,
        "config": Settings.of(subject.config).values,
        "images": [labelled.train.num_samples, labelled.val.num_samples], "features": options.features,
        "mean": subject.images.mean, "std": subject.images.std, "batch_size": options.batch_size,
        "device": ranks.device.type, "torch": torch.__version__, "fasttrain": __version__,
    }  # fmt: skip


def protocols(
    subject: Subject, options: EvaluateConfig, method: Method, labelled: Labelled, untrained: bool, ranks: Ranks,
    folder: pathlib.Path,
) -> Iterator[Ranked]:  # fmt: skip
    """What each protocol that is asked for ranks, of one data set. folder: of what is finished."""
    config, images = subject.config, subject.images
    preparation = Preparation(
        config.views.size, images.mean, images.std, options.batch_size, ranks.threads(options.workers),
        config.data.max_failed_fraction,
    )  # fmt: skip
    encoder, projector = method.evaluated
    if options.knn.knn or options.linear.linear or options.few_shot.shots:
        network = encoder if options.features == "encoder" else nn.Sequential(encoder, projector)
        memory, queries = (
            extract_on_all(network, store, folder / split, ranks, preparation)
            for split, store in zip(SPLITS, (labelled.train, labelled.val), strict=True)
        )
        ranked = {}
        for each in over_features(
            options.knn, options.linear, options.few_shot, options.features, memory, queries,
            len(labelled.train.classes), ranks,
        ):  # fmt: skip
            if not each.variant:
                ranked[each.protocol] = each.ranked_Nr
            yield each
        if ranks.is_main and not (untrained or labelled.variant):
            keep_representation(
                subject.run, memory, queries, labelled.train, labelled.val, ranked, preparation, ranks.device,
                step=subject.checkpoint.state["step"], data=str(labelled.path), features=options.features,
            )  # fmt: skip
    plain, _ = make_encoder(config.encoder, config.views.size)
    plain.load_state_dict(encoder.state_dict())
    yield from over_images(
        options.over_images, config.encoder.arch, plain, labelled.train, labelled.val, preparation,
        folder / "classifiers", ranks, SEED,
    )  # fmt: skip


def with_protocols(options: EvaluateConfig) -> EvaluateConfig:
    """With kNN and the linear probe, where no protocol is asked for."""
    images = options.over_images
    trained = images.linear_moco or images.linear_dino or images.finetune or images.semi or images.semi_files
    if options.knn.knn or options.linear.linear or options.few_shot.shots or trained:
        return options
    return replace(options, knn=replace(options.knn, knn=True), linear=replace(options.linear, linear=True))
