"""Protocols that train on images: a linear head on an encoder, frozen or trained with it, by a recipe of recipes.py.

Images come through the loader, in the order and with the views that training uses, on all ranks. The same command goes
on after an interruption, on a CPU to the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import signal
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.engine.precision import DTYPES
from fasttrain.engine.ranks import Ranks, data_parallel
from fasttrain.engine.views import make_views, on_device
from fasttrain.evaluation.accuracy import RANKED
from fasttrain.evaluation.classifier import Classifier, make_optimizer, set_rates
from fasttrain.evaluation.features import FAILED, Preparation, check_labels, full_precision, outputs
from fasttrain.evaluation.ranking import best_classes
from fasttrain.evaluation.recipes import CROP_SCALE, Supervised, described, precision
from fasttrain.evaluation.unfinished_classifier import Unfinished, digest
from fasttrain.input import Batch, LoaderError, Order, Selection, Shuffle, Store, open_loader
from fasttrain.kernels.augment import Views
from fasttrain.networks.vision_transformer import dropped_paths
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.progress import progress
from fasttrain.system.signals import Stopped, StopSignal
from fasttrain.views.spec import ViewSpec

CROP_AND_FLIP = (ViewSpec(scale=CROP_SCALE, jitter_p=0.0, gray_p=0.0, blur_p=0.0),)


def settings_of(encoder: nn.Module, recipe: Supervised, size: int, device: torch.device) -> dict[str, Any]:
    """What is printed with a figure of the recipe: see recipes.described; and the encoder's own stochastic depth."""
    settings = described(recipe, Classifier(encoder, recipe, size, 1, 0).about, device.type)
    return settings if recipe.frozen else settings | {"drop_path": dropped_paths(encoder)}


def train_classifier(
    encoder: nn.Module, recipe: Supervised, train: Store, val: Store, preparation: Preparation, work: pathlib.Path,
    ranks: Ranks, seed: int, shuffle: Shuffle | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train a classifier by a recipe on all ranks, and rank the classes of every image of val, once, at the end.

    encoder: (N, 3, S, S) → (N, F), with plain batch norm where it is trained; it is left as it is. preparation: its
    batch is val's. work: a folder that this process alone uses, from which the same call goes on; the caller removes
    it once the figures are kept. seed: of the head's weights, the order and the views. shuffle: of train, the same on
    all ranks; None: global.
    Returns ranked_Nr, as evaluation/accuracy.py has it, and label_N, of the images that can be read, on every rank.
    Raises UserError for a batch that the ranks can't share and for images without labels, LoaderError for too many that
    can't be read, RunError for a loss that is no number, and Stopped after a signal, with what is done saved.
    """
    if recipe.batch_size % ranks.world_size:
        raise UserError(
            f"{recipe.protocol}: a batch of {recipe.batch_size} images can't be shared by {ranks.world_size} processes"
        )
    classifier = Classifier(encoder, recipe, preparation.size, len(train.classes), seed)
    images = [preparation.size, *preparation.mean, *preparation.std]
    lanes, block_S, _ = shuffle or Shuffle(0, None)
    order = Order(train.num_samples, recipe.batch_size, seed, True, ranks.rank, ranks.world_size, lanes, block_S)
    of_blocks = [lanes] if lanes else []
    found = digest([asdict(recipe), classifier.about, images, seed, ranks.device.type, *of_blocks], encoder, train)
    unfinished = Unfinished(work, found, ranks)
    classifier.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    drawn_on = [ranks.device] if ranks.device.type == "cuda" else []
    with StopSignal() as stop, torch.random.fork_rng(drawn_on):
        Training(classifier, recipe, train, order, preparation, unfinished, ranks, seed).run(stop)
    return ranked(classifier, val, preparation, ranks)


class Training:
    """A classifier on its way through the epochs of a recipe."""

    def __init__(
        self, classifier: Classifier, recipe: Supervised, train: Store, order: Order, preparation: Preparation,
        unfinished: Unfinished, ranks: Ranks, seed: int,
    ) -> None:  # fmt: skip
        self._classifier, self._recipe, self._store, self._seed = classifier, recipe, train, seed
        self._order, self._preparation, self._unfinished, self._ranks = order, preparation, unfinished, ranks
        self._optimizer = make_optimizer(classifier, recipe)
        self._dtype = DTYPES[precision(recipe, ranks.device.type)]
        self._views: Views | None = None  # one buffer for all steps
        self._step = self._resumed()
        self._model = data_parallel(classifier, static_graph=True)

    def run(self, stop: StopSignal) -> None:
        """Train to the end. Raises Stopped, with a checkpoint written, after a signal."""
        recipe, ranks, steps = self._recipe, self._ranks, self._order.steps_per_epoch
        total, done = (count * recipe.batch_size for count in (recipe.epochs * steps, self._step))
        shown = progress(total, done, recipe.protocol, quiet=not ranks.is_main)
        loader = open_loader(
            self._store, self._order, self._preparation.workers, device=ranks.device,
            max_failed_fraction=self._preparation.max_failed_fraction, labels=True,
        )  # fmt: skip
        with contextlib.closing(loader), shown as advance, self._precise():
            for epoch in range(self._step // steps, recipe.epochs):
                loader.load_state_dict({"epoch": epoch, "step": self._step % steps})
                sums_2, first = torch.zeros(2, device=ranks.device), self._step
                for batch in loader.epoch(epoch):
                    sums_2 += self._take_step(batch, epoch)
                    advance(recipe.batch_size)
                    self._end_if(ranks.agree(stop.received))
                    if self._unfinished.due(epoch_ends=False):
                        self._save()
                self._tell(epoch, sums_2 / (self._step - first))
                if self._unfinished.due(epoch_ends=True) or (ranks.is_main and epoch + 1 == recipe.epochs):
                    self._save()
            for _ in range(2):  # what ranks were sent in the last step, and while it was saved
                self._end_if(ranks.agree(stop.received))

    def _take_step(self, batch: Batch, epoch: int) -> Tensor:
        """Returns the batch's loss, and its part that is classified right; (2,) on the device."""
        preparation, kind = self._preparation, self._ranks.device.type
        assert batch.label_B is not None
        check_labels(self._store, batch.index_B, batch.label_B)
        self._views = make_views(
            batch, CROP_AND_FLIP, preparation.size, self._seed, epoch, preparation.mean, preparation.std,
            self._dtype, out=self._views,
        )  # fmt: skip
        label_B = on_device(batch.label_B, self._ranks.device)
        assert label_B is not None
        set_rates(self._optimizer, self._recipe.factor(self._step / self._order.steps_per_epoch))
        drawn = (self._seed * 1_000_003 + self._step) * 65_537 + self._ranks.rank
        torch.manual_seed(drawn % 2**63)  # of dropped paths: there is no random state to save
        with torch.autocast(kind, self._dtype, enabled=self._dtype != torch.float32):
            logits_BC = self._model(self._views[0][0])
            loss = F.cross_entropy(logits_BC, label_B)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        return torch.stack([loss.detach(), (logits_BC.argmax(1) == label_B).float().mean()])

    def _precise(self) -> contextlib.AbstractContextManager[None]:
        return full_precision() if self._recipe.frozen else contextlib.nullcontext()

    def _tell(self, epoch: int, mean_2: Tensor) -> None:
        """A line for an epoch. Raises RunError, on every rank, for a loss that is no number."""
        terms = self._ranks.mean(dict(zip(("loss", "right"), mean_2, strict=True)))
        loss, right = (float(term) for term in terms.values())
        self._ranks.together(lambda: self._check(epoch, loss))
        if self._ranks.is_main:
            line = f"epoch {epoch + 1} of {self._recipe.epochs}: loss {loss:.4f}, {right:.1%} of crops right"
            print(f"{self._recipe.protocol}, {line}", file=sys.stderr, flush=True)

    def _check(self, epoch: int, loss: float) -> None:
        if not math.isfinite(loss):
            name = f"{self._recipe.protocol}: the loss of epoch {epoch + 1} is no number"
            raise RunError(
                f"{name}: {'the features are none, either' if self._recipe.frozen else 'the encoder has diverged'}"
            )

    def _end_if(self, number: int) -> None:
        """Raises Stopped for a signal, once the state is saved."""
        if not number:
            return
        # The others wait: a rank that ends takes the one that is still writing with it.
        self._ranks.together(self._save if self._ranks.is_main else lambda: None)
        if self._ranks.is_main:
            said = f"{self._recipe.protocol} stopped by {signal.Signals(number).name} after {self._step} steps"
            print(f"{said}; the same command continues", file=sys.stderr, flush=True)
        raise Stopped(number)

    def _save(self) -> None:
        encoder = {} if self._recipe.frozen else self._classifier.encoder.state_dict()
        head, optimizer = self._classifier.head.state_dict(), self._optimizer.state_dict()
        self._unfinished.save({"step": self._step, "encoder": encoder, "head": head, "optimizer": optimizer})

    def _resumed(self) -> int:
        """Takes the newest state of this classifier, if there is one; returns the steps that are done."""
        state = self._unfinished.newest()
        if state is None:
            return 0
        if not self._recipe.frozen:
            self._classifier.encoder.load_state_dict(state["encoder"])
        self._classifier.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def ranked(classifier: Classifier, val: Store, preparation: Preparation, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The likeliest classes of every image's central crop, and its label: see train_classifier. Every rank classifies
    its share."""
    mine = Selection(val, np.array_split(np.arange(val.num_samples), ranks.world_size)[ranks.rank])
    limit, top = preparation.most_failed(val.num_samples), min(RANKED, len(val.classes))
    parts = [(torch.empty(0, top, dtype=torch.int64), torch.empty(0, dtype=torch.int64))]

    def classify() -> None:
        with progress(mine.num_samples, title="val", quiet=not ranks.is_main) as advance:
            for logits_BC, label_B in outputs(classifier.eval(), mine, ranks.device, preparation, limit):
                parts.append((best_classes(torch.from_numpy(logits_BC)), label_B))
                advance(len(label_B))

    ranks.together(classify)
    ranked_Nr, label_N = (torch.cat(part) for part in zip(*itertools.chain(*ranks.gather(parts)), strict=True))
    good_N = label_N != FAILED
    ranks.together(lambda: _check_failed(int((~good_N).sum()), limit, val))
    return ranked_Nr[good_N], label_N[good_N]


def _check_failed(failed: int, limit: int, val: Store) -> None:
    """Raises LoaderError where the ranks together could not read more than `limit` images, or any."""
    if failed > limit or failed == val.num_samples:
        raise LoaderError(f"{failed} images can't be read, more than --max-failed-fraction of training allows")
