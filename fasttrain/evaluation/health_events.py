"""When the health of a representation is measured, and what follows from it: events among the metrics, a warning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from fasttrain.evaluation.collapse import LOOKED_AT, YOUNG, YOUNG_STEPS, Alarm
from fasttrain.evaluation.health import Figures, HealthMonitor
from fasttrain.evaluation.watched import Watched
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.views.spec import Recipe

PART = 0.005  # of a run's passes of images: in fp32, and with the decoding, those of an event take up to twice as long
PASSES = 2.5  # of each image: in train by itself and, of every fourth, in two views; of as many in val
LEAST, MOST = 128, 4096  # images of a split
USUAL, MOST_EVENTS = 10, 100
COLLAPSED = -1  # what ends a run in place of a signal


class Plan(NamedTuple):
    """Events come every so many steps, 0: never, of at most so many images of a split. young: steps until one may find
    a collapse."""

    every: int
    images: int
    young: int


def plan(
    asked: int | Literal["auto"], steps: int, batch_size: int, recipe: Recipe, world_size: int, needs: bool = False
) -> Plan:
    """Such that events take PART of a run of so many steps, with as many images as leave USUAL events.

    An image's step takes at least a pass with its backward, as long as two more, and one of each other view, on one of
    `world_size` ranks, while the others wait for the first during an event. So more ranks have fewer events, but two at
    least, of the same images: a run may go on with others. "auto" has none where not even the first and the last step
    have room on one rank, unless something `needs` them: runs of less than about 32 thousand images in all. asked:
    every so many steps, whatever they take. Raises UserError for none where something needs them.
    """
    if needs and asked == 0:
        raise UserError("--online-probe, --lidar and --stop-on-collapse are looked at by --health-every, which is 0")
    room = PART * steps * batch_size * (2 + sum(spec.count * spec.size**2 for spec in recipe)) / PASSES  # of one rank
    events = USUAL if asked == "auto" else max(1, steps // max(asked, 1))
    images = min(MOST, max(LEAST, int(room / (events + 1))))
    young = max(YOUNG_STEPS, math.ceil(YOUNG * steps))
    if asked != "auto":
        return Plan(asked, images, young)
    least = int(needs or room >= 2 * images)
    events = max(least, min(MOST_EVENTS, int(room / images / world_size) - 1))
    return Plan(math.ceil(steps / events) if events > 0 else 0, images, young)


class HealthEvents:
    """The health at step 0, every so many steps and at the last one, on the first rank while the others wait.

    One that a signal has cut short is measured again by the run that goes on from that step.
    """

    def __init__(self, watched: Watched, monitor: HealthMonitor | None, every: int, alarm: Alarm) -> None:
        """monitor: None for no events."""
        self._watched, self._monitor, self._every, self._alarm = watched, monitor, every, alarm

    def due(self, step: int) -> bool:
        """Is a step one of those to be measured? (The same on all ranks.)"""
        return self._monitor is not None and (step % self._every == 0 or step == self._watched.last)

    def __call__(self, step: int, epoch: int) -> int:
        """Measure a step that is due, unless it has been. Returns the signal that cut it short, COLLAPSED for a
        collapse that is to end the run, or 0.

        Every rank calls it, and all return the same.
        """
        if not self.due(step):
            return 0
        with self._watched.display.doing("measuring the representation"):
            return self._watched.of_first(lambda each_batch: self.measure(step, epoch, each_batch))

    def measure(self, step: int, epoch: int, each_batch: Callable[[], None]) -> int:
        """What the first rank does of it. Raises what each_batch does."""
        assert self._monitor is not None
        watched = self._watched
        figures = self._measured(step) if step == watched.first else None
        if not figures:
            began = time.monotonic()
            try:
                figures = self._monitor(watched.method, watched.probe, watched.mean, watched.std, each_batch)
            except (RunError, DataError, OSError) as error:  # of images that training may never read
                watched.display.say(f"the representation is not looked at: {error}")
                return 0
            watched.metrics.event(step, epoch, time.monotonic() - began, **figures)
        return COLLAPSED if self._alarm(step, figures) else 0

    def _measured(self, step: int) -> Figures | None:
        """What an attempt before has measured; a figure that is not finite is None in its file."""
        for entry in self._watched.entries():
            if entry["step"] == step and entry.keys() >= LOOKED_AT:
                return {name: math.nan if figure is None else figure for name, figure in entry.items()}
        return None
