"""Evaluate runs' encoders on labelled images they were not trained on, by the protocols of the papers."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fasttrain import __version__
from fasttrain.engine.networks import initialise, make_method
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.evaluation.accuracy import accuracy, per_class
from fasttrain.evaluation.extraction import extract_on_all
from fasttrain.evaluation.features import Preparation
from fasttrain.evaluation.over_features import over_features
from fasttrain.evaluation.over_images import over_images
from fasttrain.evaluation.ranking import Ranked
from fasttrain.evaluation.representation import keep_representation
from fasttrain.jobs.init import weights_started_from
from fasttrain.jobs.options import EvaluateConfig
from fasttrain.jobs.report import write_report
from fasttrain.jobs.scratch import Scratch
from fasttrain.jobs.subjects import Labelled, Subject, check_same_images, open_subject
from fasttrain.methods import Method
from fasttrain.networks.encoders import make_encoder
from fasttrain.run.evaluations import CHECKPOINT, Evaluation, keep_evaluations
from fasttrain.system.errors import UserError, printable
from fasttrain.system.options import Settings, check_of_use, flat
from fasttrain.trained import load_weights

PATIENCE = datetime.timedelta(days=1)  # that a rank has with others whose share takes longer
SPLITS = "train", "val"
SEED = 0  # of what is drawn, so that all runs are compared by the same images and first heads


def evaluate(options: EvaluateConfig) -> int:
    """Print and keep the figures; returns the exit status."""
    options = with_protocols(options)
    usual = flat(EvaluateConfig(options.run))
    check_of_use(options, {name for name, value in flat(options).items() if value != usual[name]})
    runs = [pathlib.Path(run) for run in options.run]
    if not runs:
        raise UserError("RUN is missing: the folder of a run, or of several")
    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise UserError("a run is named twice: figures of several are means over different seeds")
    subjects = [open_subject(run, options) for run in runs]  # all of them, before anything is computed
    check_same_images(subjects)
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
    settings of each protocol. A step or setting that differs between runs is a list, of one for each."""
    by_name: dict[str, list[float]] = {}
    for evaluation in itertools.chain(*figures):
        for name, value in evaluation.figures().items():
            by_name.setdefault(name, []).append(value)
    line: dict[str, Any] = {"step": one_or_all([of_run[0].step for of_run in figures])}
    if len(figures) > 1:
        line["runs"] = len(figures)
    for name, values in by_name.items():
        line[name] = round(statistics.fmean(values), 2)
        if len(figures) > 1:
            line[f"{name}_std"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
    settings = [{each.name: each.settings for each in of_run} for of_run in figures]  # the untrained come first
    line["protocol"] = {
        protocol: {name: one_or_all([of_run.get(protocol, {}).get(name) for of_run in settings]) for name in found}
        for protocol, found in settings[0].items()
    }
    return line


def one_or_all(values: list[Any]) -> Any:  # noqa: ANN401 - a setting is a number, text or list
    """What all runs have alike, or what each has."""
    return values[0] if all(value == values[0] for value in values) else values


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
                chosen = {CHECKPOINT: "best by kNN on val"} if options.best and not untrained else {}
                evaluation = Evaluation(
                    found.protocol, step, untrained, found.settings | chosen, labelled.place.real, labelled.fingerprint,
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
    if on_features(options):
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
                step=subject.checkpoint.state["step"], data=labelled.place.real, features=options.features,
            )  # fmt: skip
    if on_images(options):
        plain, _ = make_encoder(config.encoder, config.views.size)
        plain.load_state_dict(encoder.state_dict())
        yield from over_images(
            options.over_images, config.encoder.arch, plain, labelled.train, labelled.val, preparation,
            folder / "classifiers", ranks, SEED, labelled.place,
        )  # fmt: skip


def with_protocols(options: EvaluateConfig) -> EvaluateConfig:
    """With kNN and the linear probe, where no protocol is asked for."""
    if on_features(options) or on_images(options):
        return options
    return replace(options, knn=replace(options.knn, knn=True), linear=replace(options.linear, linear=True))


def on_features(options: EvaluateConfig) -> bool:
    """Is a protocol over frozen features asked for?"""
    return bool(options.knn.knn or options.linear.linear or options.few_shot.shots)


def on_images(options: EvaluateConfig) -> bool:
    """Is a protocol that trains on images asked for?"""
    images = options.over_images
    return bool(images.linear_moco or images.linear_dino or images.finetune or images.semi or images.semi_files)
