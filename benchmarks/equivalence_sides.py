"""The two sides of equivalence.py: a run of train.py, and the published loop on the same views."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from benchmarks.methods import command
from benchmarks.step_peers import MoCoLoop, Recipe
from fasttrain import ViewLoader
from fasttrain.config import TrainConfig
from fasttrain.engine.networks import make_method
from fasttrain.engine.optim import Schedule
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.evaluation.monitor import KnnMonitor
from fasttrain.input import located
from fasttrain.methods.moco import MoCo
from fasttrain.methods.options.moco import MoCoOptions
from fasttrain.run.metrics import read_metrics
from fasttrain.system.errors import UserError
from fasttrain.system.options import flag, flat

# What the plain loop has no other value for.
PLAIN: dict[str, Any] = {
    "method": "moco", "extend": (), "max_steps": 0, "val_fraction": 0.0, "resolution": "", "init": "",
    "batch_norm": "plain", "symmetric": False, "decoupled": False, "decoupled_weighted": False, "cross": "none",
    "uniform": "none", "ema_end": None, "optimizer": "sgd", "accumulate": 1, "decay": "auto", "weight_decay_end": None,
    "vector_lr": 1.0, "clip_norm": 0.0,
}  # fmt: skip


class Curve(NamedTuple):
    """What a side has learnt, and how fast. knn: accuracy in per cent by step."""

    knn: dict[int, float]
    images_per_sec: float


def check_plain(config: TrainConfig) -> None:
    """Raises UserError for a training that the plain loop can't follow."""
    values = flat(config)
    for name, only in PLAIN.items():
        if values[name] != only:
            raise UserError(f"{flag(name)} {values[name]}: the plain loop has {only!r} alone")
    if values["queue_size"] % values["batch_size"]:
        raise UserError(
            f"--queue-size {values['queue_size']}: the plain loop needs a multiple of --batch-size "
            f"{values['batch_size']}"
        )


class PlainSide:
    """The plain loop with the initial weights and queue, the views and the learning rates of a run of fasttrain."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """Raises UserError for a training that the loop can't follow."""
        check_plain(config)
        method, optimisation, views, data = config.method, config.optimisation, config.views, config.data
        assert isinstance(method, MoCoOptions)
        recipe = Recipe(
            method.dim, method.queue_size, method.ema, method.temperature, optimisation.peak_lr,
            optimisation.weight_decay,
        )  # fmt: skip
        self.method = make_method(method, config.encoder, views.size, config.run.seed)
        assert isinstance(self.method, MoCo)
        network = nn.Sequential(self.method.encoder, self.method.projector)  # trained in place
        self.loop = MoCoLoop(network, recipe, ranks.device, amp=False, channels_last=False)
        self.loop.set_queue(self.method.queue.keys_KD)
        self.loader = ViewLoader(
            data.data, views.recipe_for(method.all_views), views.size, optimisation.batch_size, labels=False,
            shuffle=True if data.shuffle == "auto" else data.shuffle, shuffle_window=data.shuffle_window,
            seed=config.run.seed, device=ranks.device, loader=data.loader,
            workers=ranks.threads(config.machine.workers), max_failed_fraction=data.max_failed_fraction,
            cache=data.elsewhere.cache, cache_gb=data.elsewhere.cache_gb,
        )  # fmt: skip
        self._schedule = Schedule(optimisation, len(self.loader))

    def epoch(self, epoch: int) -> Iterator[float]:
        """The loss of each of its steps, as they are made. epoch: from 0, one after the other."""
        for step, batch in enumerate(self.loader, epoch * len(self.loader)):
            self.loop.set_learning_rate(self._schedule(step).lr)
            yield self.loop.step(*batch.views)


def fast(words: Sequence[str], run: pathlib.Path) -> Curve:
    """A run of train.py, trained or gone on with. Raises RunError where it fails."""
    command("train.py", *words)
    entries = read_metrics(run / "metrics.jsonl")
    rates = [entry["images_per_sec"] for entry in entries if "images_per_sec" in entry]
    curve = {entry["step"]: entry["knn_top1"] for entry in entries if "knn_top1" in entry}
    return Curve(curve, statistics.median(rates))


def plain(config: TrainConfig, run: pathlib.Path) -> Curve:
    """The plain loop, whose features lie on the disk of `run` meanwhile."""
    curve, rates = {}, []
    with given_back():
        ranks = Ranks(config.machine.device)
        side = PlainSide(config, ranks)
        closing = contextlib.closing(located(config.data.data, config.data.elsewhere))
        with side.loader as loader, closing as place:
            workers, k = ranks.threads(config.machine.workers), config.logging.knn_k
            knn = KnnMonitor(place, config.data, k, config.views.size, ranks.device, workers)
            for epoch in range(1, config.optimisation.epochs + 1):
                began = time.perf_counter()
                losses = list(side.epoch(epoch - 1))
                rates.append(len(losses) * loader.batch_size / (time.perf_counter() - began))
                said = f"plain fp32, seed {config.run.seed}, epoch {epoch}: loss {statistics.fmean(losses):.4f}"
                if epoch % config.logging.knn_every == 0:
                    top1 = knn(side.method, loader.mean, loader.std, run, lambda: None).top1
                    curve[epoch * len(loader)] = top1
                    said += f", kNN {top1:.2f}"
                print(said, file=sys.stderr, flush=True)
    return Curve(curve, statistics.median(rates))
