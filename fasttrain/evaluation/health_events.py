"""When the health of a representation is measured, and what follows from it: events among the metrics, a warning."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, NoReturn

from fasttrain.engine.probe import OnlineProbe
from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.collapse import YOUNG, collapse
from fasttrain.evaluation.health import HealthMonitor
from fasttrain.evaluation.monitor import Interrupted
from fasttrain.methods import Method
from fasttrain.run.metrics import Metrics, read_metrics
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.system.options import Options
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
    `world_size` ranks, while the others wait for the first during an event. "auto" has none where not even the first
    and the last step have room, unless something `needs` them: runs of less than about 32 thousand images in all for
    each rank. asked: every so many steps, whatever they take. Raises UserError for none where something needs them.
    """
    if needs and asked == 0:
        raise UserError("--online-probe, --lidar and --stop-on-collapse are looked at by --health-every, which is 0")
    passes = PART * steps * batch_size / world_size * (2 + sum(spec.count * spec.size**2 for spec in recipe))
    events = USUAL if asked == "auto" else max(1, steps // max(asked, 1))
    images = min(MOST, max(LEAST, int(passes / PASSES / (events + 1))))
    young = math.ceil(YOUNG * steps)
    if asked != "auto":
        return Plan(asked, images, young)
    events = max(int(needs), min(MOST_EVENTS, int(passes / PASSES / images) - 1))
    return Plan(math.ceil(steps / events) if events > 0 else 0, images, young)


class HealthEvents:
    """The health at step 0, every so many steps and at the last one, on the first rank while the others wait.

    One that a signal has cut short is measured again by the run that goes on from that step.
    """

    def __init__(
        self, monitor: HealthMonitor | None, plan: Plan, last_step: int, stops: bool, options: Options,
        probe: OnlineProbe | None, run: pathlib.Path, ranks: Ranks, received: Callable[[], int],
        say: Callable[[str], None], step: int, mean: tuple, std: tuple,
    ) -> None:  # fmt: skip
        """monitor: None for no events. stops: a collapse ends the run. options: the method's own. received: the signal
        that this process was sent, 0 for none. say: shows a line. step: the one that the run goes on from. mean, std:
        by which views are normalised."""
        self._monitor, self._plan, self._last, self._stops = monitor, plan, last_step, stops
        self._options, self._probe, self._run, self._ranks = options, probe, run, ranks
        self._received, self._say, self._from, self._mean, self._std = received, say, step, mean, std
        self.line = ""  # what was last said of a collapse that has not recovered

    def due(self, step: int) -> bool:
        """Is a step one of those to be measured? (The same on all ranks.)"""
        return self._monitor is not None and (step % self._plan.every == 0 or step == self._last)

    def __call__(self, method: Method, step: int, epoch: int, metrics: Metrics) -> int:
        """Measure a step, unless it has been. Returns the signal that cut it short, COLLAPSED for a collapse that is to
        end the run, or 0. Every rank calls it, and all return the same.
        """
        stopped, self.line = self._ranks.of_first(
            lambda still_here: (self._measure(method, step, epoch, metrics, still_here), self.line)
        )
        return stopped

    def _measure(self, method: Method, step: int, epoch: int, metrics: Metrics, still_here: Callable[[], None]) -> int:
        def each_batch() -> None:
            still_here()
            if self._received():
                raise Interrupted

        assert self._monitor is not None
        if step == self._from and self._is_measured(step):
            return 0
        began = time.monotonic()
        try:
            figures = self._monitor(method, self._probe, self._mean, self._std, each_batch)
        except Interrupted:
            return self._received()
        except (RunError, DataError, OSError) as error:  # of images that training may never read
            self._say(f"the representation is not looked at: {error}")
            return 0
        metrics.event(step, epoch, time.monotonic() - began, **figures)
        line = collapse(figures, self._options) if step >= self._plan.young else ""
        if line and not self.line and not self._stops:  # else it is the run's last line
            self._say(line)
        self.line = line
        return COLLAPSED if line and self._stops else 0

    def refuse(self) -> NoReturn:
        """Raises RunError, which says what has collapsed."""
        raise RunError(f"{self.line} (--stop-on-collapse)")

    def _is_measured(self, step: int) -> bool:
        entries = read_metrics(self._run / "metrics.jsonl")
        return any(entry["step"] == step and "rankme" in entry for entry in entries)
