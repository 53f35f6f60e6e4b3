"""What looks at a run's representation while it lasts: its health, kNN, the online probe. None of it moves a weight."""

from __future__ import annotations

from typing import NamedTuple

from fasttrain.config import TrainConfig
from fasttrain.engine.probe import OnlineProbe
from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.collapse import Alarm
from fasttrain.evaluation.health import HealthMonitor
from fasttrain.evaluation.health_events import HealthEvents, Plan, plan
from fasttrain.evaluation.monitor import KnnEvents, KnnMonitor
from fasttrain.evaluation.watched import Watched
from fasttrain.input import Place, Store
from fasttrain.system.errors import UserError


class Monitors(NamedTuple):
    """None, each: not asked for. plan: of health."""

    plan: Plan
    health: HealthMonitor | None
    knn: KnnMonitor | None
    probe: OnlineProbe | None


def open_monitors(config: TrainConfig, place: Place, store: Store, steps_per_epoch: int, ranks: Ranks) -> Monitors:
    """What a run asks for. place: its data. store: their train split. Raises UserError, also DataError."""
    logging, views, data = config.logging, config.views, config.data
    recipe, workers = config.recipe, ranks.threads(config.machine.workers)
    knn = KnnMonitor(place, data, logging.knn_k, views.size, ranks.device, workers) if logging.knn_every else None
    probe = OnlineProbe(len(store.classes), ranks.device) if logging.online_probe else None
    steps, batch_size = config.optimisation.epochs * steps_per_epoch, config.optimisation.batch_size
    needs = logging.online_probe or logging.lidar or logging.stop_on_collapse
    found = plan(logging.health_every, steps, batch_size, recipe, ranks.world_size, needs)
    health = None
    if found.every:
        health = HealthMonitor(
            place, data, recipe, views.size, config.run.seed, found.images, logging.lidar, ranks.device, workers
        )
        if probe and not health.is_labelled:
            raise UserError(f"--online-probe is measured on the val split, and {place} has none with labels")
    return Monitors(found, health, knn, probe)


class Watch(NamedTuple):
    """Called at every step by every rank: nothing happens at one that is not due."""

    health: HealthEvents
    knn: KnnEvents
    alarm: Alarm


def make_watch(config: TrainConfig, monitors: Monitors, steps_per_epoch: int, watched: Watched) -> Watch:
    logging, plan = config.logging, monitors.plan
    alarm = Alarm(config.method, plan.young, logging.stop_on_collapse, watched.display.say)
    knn = KnnEvents(watched, monitors.knn, logging.knn_every * steps_per_epoch)
    return Watch(HealthEvents(watched, monitors.health, plan.every, alarm), knn, alarm)
