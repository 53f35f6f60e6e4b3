"""Where a run's figures go: to metrics.jsonl always, and to the services that are asked for, each by a thread.

So no step waits for a service, and a run goes on without one that fails.
"""

from __future__ import annotations

import functools
import importlib
import math
import pathlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fasttrain.run.metrics import HISTOGRAM, Entry, MetricsFile, Sink
from fasttrain.run.options import LoggingOptions
from fasttrain.run.services import Attempt, MLflow, Service, TensorBoard, WandB
from fasttrain.system.errors import UserError, note, printable

CLOSE_SECONDS = 20.0  # that a run waits at its end for a service to take the last figures
MOST_WAITING = 10_000  # entries
# by the option's name: the module and the package that it is in
SERVICES: dict[str, tuple[Callable[[Attempt], Service], str, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (WandB, "wandb", "wandb"),
    "mlflow": (MLflow, "mlflow", "mlflow-skinny"),
}


def asked_for(options: LoggingOptions) -> list[str]:
    """The services that a run is to use."""
    return [name for name in SERVICES if getattr(options, name)]


def check_services(options: LoggingOptions) -> None:
    """Raises UserError where a service's package is missing, or it can't be used as it is set up."""
    for name in asked_for(options):
        service, module, package = SERVICES[name]
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(f"--{name} needs the {package} package: pip install {package}") from None
        if hasattr(service, "check"):
            service.check()


def open_sinks(run: pathlib.Path, step: int, options: LoggingOptions, settings: Mapping[str, Any]) -> tuple[Sink, ...]:
    """The sinks of a run that goes on from a step: RUN/metrics.jsonl, and the services. settings: of the run, for them
    to show."""
    file = MetricsFile(run / "metrics.jsonl", step)
    if file.reached and not step:
        note(f"{run} has no checkpoint yet: training from the start, though figures told of step {file.reached}")
    attempt = Attempt(run, step, file.reached, settings)
    return file, *(Aside(name, functools.partial(SERVICES[name][0], attempt)) for name in asked_for(options))


class Aside:
    """A sink whose service is opened, told and closed by a thread; one that fails is left, with a line."""

    def __init__(self, name: str, open_service: Callable[[], Service]) -> None:
        """name: of its option."""
        self._name, self._open, self._left = name, open_service, False
        self._waiting: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, entry: Entry) -> None:
        if not self._left:
            self._waiting.put(entry)
            if self._waiting.qsize() > MOST_WAITING:
                self._leave(f"{MOST_WAITING} entries wait for it")

    event = write

    def close(self) -> None:
        """Wait until it has taken all, CLOSE_SECONDS at most."""
        if not self._left:
            self._waiting.put(None)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._leave(f"it has not taken the last figures in {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        try:
            service = self._open()
            while (entry := self._waiting.get()) is not None:
                service.write(entry["step"], _figures(entry))
            service.close()
        except (Exception, SystemExit) as error:  # the latter would end this thread without a word
            self._leave(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _leave(self, why: str) -> None:
        if not self._left:
            self._left = True
            print(f"warning: the run goes on without --{self._name}: {printable(why)}", file=sys.stderr, flush=True)


def _figures(entry: Entry) -> dict[str, float]:
    numbers = {name: value for name, value in entry.items() if name != "step" and not name.startswith(HISTOGRAM)}
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
