"""A run in one line: what was trained on what, how far it is, what it reached, how it ended. Reads no more than that
takes: of metrics.jsonl its end, so that a thousand runs are listed in seconds; and needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fasttrain.run.ending import FILE, LARGEST, Ending, ending_of
from fasttrain.run.evaluations import Evaluation, read_evaluations
from fasttrain.run.folder import CONFIG, LOCK, config_of, read_record
from fasttrain.system.errors import UserError
from fasttrain.system.regular import open_regular

METRICS = "metrics.jsonl"
MARKS = {CONFIG.name, METRICS, "checkpoints", LOCK}  # a run folder has two of these, whatever it has lost
BLOCK_BYTES, LINE_BYTES = 1 << 14, 1 << 16  # read at a time; of a line, more is none
RATES = 40  # newest entries whose images/s count


@dataclass(frozen=True)
class Accuracy:
    """top1: percent. step: whose weights. source: "evaluation", by evaluate.py, or "training", by --knn-every.
    settings: of its protocol, where evaluate.py has kept them."""

    top1: float
    step: int
    source: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Summary:
    """What is not known, or not there, is None; "" where it is a name. ended: its state is "damaged" for a run that
    can't be read, and line says why. when: of its last sign of life, seconds since the epoch."""

    path: pathlib.Path
    ended: Ending
    when: float
    method: str = ""
    arch: str = ""
    data: str = ""
    preset: str = ""
    step: int | None = None
    last_step: int | None = None
    epochs: float | None = None
    knn: Accuracy | None = None
    linear: Accuracy | None = None
    loss: float | None = None
    images_per_sec: float | None = None


def summary(run: pathlib.Path) -> Summary:
    """Of a run folder, also one of which files are damaged or missing; never raises for what it holds."""
    try:
        record = read_record(config_of(run))
        return _summary(run, record)
    except (UserError, OSError) as error:
        return Summary(run, Ending("damaged", str(error)), _when(run))


def _summary(run: pathlib.Path, record: dict[str, Any]) -> Summary:
    config, ending = record["config"], ending_of(run, record)
    steps = record.get("steps")
    steps = steps if isinstance(steps, dict) else {}
    last_step, per_epoch = (_whole(steps.get(name)) for name in ("last", "per_epoch"))
    newest, rate, measured = _figures(run / METRICS, bool(config.get("knn_every")))
    step = ending.step if ending.time else newest.get("step")
    evaluations = read_evaluations(run)
    return Summary(
        run,
        ending,
        _when(run),
        method=str(config.get("method", "")),
        arch=str(config.get("arch", "")),
        data=pathlib.Path(str(config.get("data", ""))).name,
        preset=str(config.get("preset", "")),
        step=step,
        last_step=last_step,
        epochs=step / per_epoch if per_epoch and step is not None else None,
        knn=_newer(_evaluated(evaluations, "knn"), measured),
        linear=_evaluated(evaluations, "linear"),
        loss=_number(newest.get("loss")),
        images_per_sec=rate,
    )


def _figures(path: pathlib.Path, has_knn: bool) -> tuple[dict[str, Any], float | None, Accuracy | None]:
    """The newest entry of training, the median rate of the newest ones (but the first of a run, which has the start in
    it, where there are others), and kNN's newest accuracy."""
    newest: dict[str, Any] = {}
    rates: list[float] = []
    measured, complete = None, False
    for line in _lines_backwards(path):
        if len(rates) == RATES and b'"knn_top1"' not in line:  # need not be parsed
            continue
        entry = _entry(line)
        rate, top1 = _number(entry.get("images_per_sec")), _number(entry.get("knn_top1"))
        if top1 is not None and measured is None:
            measured = Accuracy(top1, entry["step"], "training")
        if rate is not None and len(rates) < RATES:
            newest = newest or entry
            rates.append(rate)
        if len(rates) == RATES and (measured or not has_knn):
            break
    else:
        complete = len(rates) < RATES
    counted = rates[:-1] if complete and len(rates) > 1 else rates
    return newest, statistics.median(counted) if counted else None, measured


def _entry(line: bytes) -> dict[str, Any]:
    """The entry that a line holds; an empty one for any other line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and _whole(entry.get("step")) is not None else {}


def _lines_backwards(path: pathlib.Path) -> Iterator[bytes]:
    """The lines of a file, the last one first; none where there is no file. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), open_regular(path, 0) as file:
        place, rest = file.seek(0, os.SEEK_END), b""
        while place:
            size = min(BLOCK_BYTES, place)
            place -= size
            file.seek(place)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
            rest = first[-LINE_BYTES:]
        yield rest


def _evaluated(evaluations: list[Evaluation], protocol: str) -> Accuracy | None:
    """The newest headline of a protocol, of the run's own weights. One of the projection only where the encoder has
    none."""
    found = [each for each in evaluations if each.name == protocol and not each.untrained]
    found.sort(key=lambda each: not each.of_projection)
    return Accuracy(found[-1].top1, found[-1].step, "evaluation", found[-1].settings) if found else None


def _newer(evaluated: Accuracy | None, measured: Accuracy | None) -> Accuracy | None:
    """The accuracy of the later step; of one step evaluate.py's, which takes all images."""
    if evaluated and measured:
        return measured if measured.step > evaluated.step else evaluated
    return evaluated or measured


def _when(run: pathlib.Path) -> float:
    """When a run's files were last written by its training; 0 where there are none."""
    times = []
    for name in (METRICS, CONFIG.name, FILE, "checkpoints"):
        try:
            times.append((run / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _number(value: object) -> float | None:
    """A finite number."""
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None  # type: ignore[arg-type]


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= LARGEST else None
