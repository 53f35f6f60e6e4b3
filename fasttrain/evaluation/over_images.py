"""The protocols that train on images, one after the other, as they are asked for."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import nn

from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.features import Preparation
from fasttrain.evaluation.labelled_part import labels_of, listed, stratified
from fasttrain.evaluation.options import OverImagesOptions, name_of_part
from fasttrain.evaluation.ranking import Ranked
from fasttrain.evaluation.recipes import OverImages, recipe
from fasttrain.evaluation.supervised import settings_of, train_classifier
from fasttrain.input import Place, Selection, Store, choose_shuffle
from fasttrain.input.options import WINDOW
from fasttrain.system.errors import note


class _Asked(NamedTuple):
    """A protocol and the images that it trains on; labels: which of them these are, in words. key: of its folder."""

    protocol: OverImages
    variant: str
    train: Store
    labels: str
    key: str


class _Part(NamedTuple):
    """Images of a training set that keep their labels: int64 places in it, ascending."""

    variant: str
    index_N: np.ndarray
    labels: str


def over_images(
    options: OverImagesOptions, arch: str, encoder: nn.Module, train: Store, val: Store, preparation: Preparation,
    work: pathlib.Path, ranks: Ranks, seed: int, place: Place | None = None,
) -> Iterator[Ranked]:  # fmt: skip
    """Every protocol that is asked for. arch: of the encoder, for the recipe; place: of the images, which are shuffled
    as --shuffle auto does; the others: see train_classifier, which says what is raised, too; UserError for a list of
    names that will not do."""
    parts = ranks.share(ranks.together(lambda: list(_parts(options, train, seed)) if ranks.is_main else []))
    for asked in _asked(options, train, parts):
        images = asked.train.num_samples
        chosen = recipe(
            asked.protocol, arch, images, images / train.num_samples, options.supervised_epochs,
            options.supervised_batch_size,
        )  # fmt: skip
        chosen = replace(chosen, protocol=" ".join(filter(None, (asked.protocol, asked.variant))))  # in messages
        settings = settings_of(encoder, chosen, preparation.size, ranks.device)
        steps = chosen.epochs * (images // chosen.batch_size)  # what is left over of an epoch's last batch is dropped
        settings |= {"steps": steps, "train_images": images, "labels": asked.labels, "seed": seed}
        shuffle = ranks.share(choose_shuffle(asked.train, place, "auto", WINDOW))
        if shuffle.lanes:
            settings |= {"shuffle": f"block, {shuffle.lanes} shards at once"}
            if ranks.is_main:
                note(f"{chosen.protocol}: {shuffle.reason}")
        classified = train_classifier(
            encoder, chosen, asked.train, val, preparation, work / asked.key, ranks, seed, shuffle
        )
        yield Ranked(asked.protocol, asked.variant, settings, *classified)


def _asked(options: OverImagesOptions, train: Store, parts: list[_Part]) -> Iterator[_Asked]:
    whole: tuple[OverImages, ...] = ("linear_moco", "linear_dino", "finetune")
    yield from (_Asked(protocol, "", train, "all", protocol) for protocol in whole if getattr(options, protocol))
    for variant, index_N, labels in parts:
        key = f"semi_{hashlib.sha256(index_N.tobytes()).hexdigest()[:16]}"
        yield _Asked("semi", variant, Selection(train, index_N), labels, key)


def _parts(options: OverImagesOptions, train: Store, seed: int) -> Iterator[_Part]:
    """Those that semi is asked for."""
    label_N = labels_of(train) if options.semi else np.empty(0, dtype=np.int64)
    for fraction in dict.fromkeys(options.semi):
        part = stratified(label_N, fraction, seed)
        yield _Part(name_of_part(fraction), part, f"{100 * fraction:g} % of each class, by the seed")
    for file in map(pathlib.Path, options.semi_files):
        yield _Part(file.stem, listed(train, file), f"those of {file.name}")
