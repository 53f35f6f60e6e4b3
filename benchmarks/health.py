#!/usr/bin/env python3
"""What part of a run's time its events of health take at --health-every auto, and a step of the online probe.

    make demo
    python benchmarks/health.py --data data/demo-shards --preset demo

Trains for some steps with an event between every few of them: of as many images as the whole run's have. The part is
that of all of the run's events beside all of its steps, by the medians of both, which this machine takes turns in.
Prints a table, appends a line to benchmarks/results/health.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from fasttrain.run.metrics import read_metrics
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import Options, Positive

STEPS = 4  # between two events


@dataclass(frozen=True)
class HealthBenchmark(Options):
    """Measure the cost of --health-every auto and --online-probe. The last line of the output is JSON."""

    data: str
    """Data set."""
    method: str = "moco"
    """Of the run."""
    preset: str = "demo"
    """Of the run."""
    arch: str = ""
    """Encoder. Empty: the preset's."""
    size: int = 0
    """Side of a view. 0: the preset's."""
    batch_size: int = 0
    """0: the preset's."""
    epochs: int = 0
    """Of the whole run. 0: the preset's."""
    probe: bool = False
    """Measure the online probe, too: of a set with labels and a val split."""
    rounds: Positive[int] = 5
    """Events that are timed, after a first one."""


def benchmark(options: HealthBenchmark) -> int:
    figures = measure(options)
    for name, value in figures.items():
        print(f"{name:>16}  {value:g}")
    record.append("health", {**vars(options), "data": pathlib.Path(options.data).name, **figures})
    print(json.dumps(figures))
    return 0


def measure(options: HealthBenchmark) -> dict[str, float]:
    """Seconds of an event and of a step, and in percent the events' part of the whole run and the probe's of a step."""
    from fasttrain.config import make_config
    from fasttrain.engine.probe import OnlineProbe
    from fasttrain.evaluation.health_events import HealthEvents, plan
    from fasttrain.jobs.train import train

    asked = {name: getattr(options, name) for name in ("arch", "size", "batch_size", "epochs")}
    values: dict[str, Any] = {name: value for name, value in asked.items() if value}
    planned: list[tuple[Any, int]] = []

    def denser(every: Any, steps: int, *more: Any) -> Any:  # noqa: ANN401
        planned.append((plan(every, steps, *more), steps))
        return planned[0][0]._replace(every=STEPS)

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            options.method, options.preset, data=options.data, run=f"{folder}/run", log_every=STEPS,
            max_steps=STEPS * (options.rounds + 1), online_probe=options.probe, **values,
        )  # fmt: skip
        with (
            mock.patch("fasttrain.jobs.watch.plan", denser), timed(HealthEvents, "measure") as events,
            timed(OnlineProbe, "learn") as probes,
        ):  # fmt: skip
            train(config)
        entries = read_metrics(pathlib.Path(folder) / "run" / "metrics.jsonl")
    (found, steps), batch_size = planned[0], config.optimisation.batch_size
    step = statistics.median(batch_size / entry["images_per_sec"] for entry in entries[2:] if "loss" in entry)
    event, probe = statistics.median(events[1:]), statistics.median(probes[1:]) if probes else 0.0
    count = 1 + -(-steps // found.every) if found.every else 0
    return {
        "steps": steps, "events": count, "images": found.images, "event_s": round(event, 3), "step_s": round(step, 4),
        "events_percent": round(100 * count * event / (steps * step), 3),
        "probe_percent": round(100 * probe / step, 3),
    }  # fmt: skip


@contextlib.contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method, from the host's side."""
    seconds: list[float] = []
    real = getattr(owner, name)

    def call(*words: Any) -> Any:  # noqa: ANN401
        began = time.perf_counter()
        result = real(*words)
        seconds.append(time.perf_counter() - began)
        return result

    with mock.patch.object(owner, name, call):
        yield seconds


if __name__ == "__main__":
    raise SystemExit(finish(lambda: benchmark(parse(HealthBenchmark, sys.argv[1:]))))
