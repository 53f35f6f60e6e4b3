"""A run's figures: summed on the device, brought to the host without a wait, handed on to metrics.jsonl and others.

A line of metrics.jsonl, an entry, has a step, its epoch, and either the means of the loss terms since the entry before
and the figures in FIGURES, or figures of an event, such as an accuracy that was measured at that step. A figure of an
event is a number, or, where its name begins with HISTOGRAM, a list of counts. In the file a number that is not finite
is null: JSON knows no other.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from fasttrain.engine.skips import MAX_SKIPPED, Skips
from fasttrain.input import Batch
from fasttrain.run.clock import BatchClock, Marks, seconds_of
from fasttrain.run.health import MEMORY, Health
from fasttrain.system.durable import naming, replace_file
from fasttrain.system.regular import open_regular

REPLACED = "replaced"  # samples of a step that stand in for others, of all ranks
ON_THEIR_WAY = 8  # entries at most; then the host waits for the oldest
FIGURES = (
    "step", "epoch", "lr", "images_per_sec", "data_wait", "transfer_wait", "views_time", "skipped", REPLACED, *MEMORY,
)  # fmt: skip
HISTOGRAM, MOST_BINS = "histogram_", 1024
LINE_BYTES, MOST_FIGURES, LARGEST = 1 << 16, 100, 1e300  # of an entry, its figures, and each of them

Entry = dict[str, Any]


class Sink(Protocol):
    """Where entries go."""

    def write(self, entry: Entry) -> None:
        """Take the loss terms and figures of some steps; a term is None where all of them were skipped."""

    def event(self, entry: Entry) -> None:
        """Take the figures of an event."""

    def close(self) -> None: ...


class Metrics:
    """Collects a run's figures without waiting for the device, and hands an entry to its sinks every `every` steps.

    A step's terms stay on the device and are summed there. On a GPU the sums are copied to the host behind the steps
    that are under way, and handed on once they have arrived. Without sinks it still knows `skips`.
    """

    def __init__(
        self, sinks: Sequence[Sink], health: Health, device: torch.device, every: int, batch_size: int
    ) -> None:
        """batch_size: of all ranks together."""
        self.skips = Skips()  # as last read
        self._sinks, self._health, self._clock = sinks, health, BatchClock(device)
        self._every, self._batch_size = every, batch_size
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._skips_3 = torch.tensor(Skips())
        self._pending: collections.deque[_Pending] = collections.deque()
        self._look: _Arriving | None = None
        self._steps, self._began = 0, time.monotonic()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, counting the time that the steps wait for each."""
        return self._clock.timed(batches)

    def making_views(self) -> contextlib.AbstractContextManager[None]:
        """Count the time of what is done in it to the views."""
        return self._clock.making_views()

    def step(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor], skips_3: Tensor) -> None:
        """Count a finished step (1 for the first). terms, with "loss" and REPLACED, and skips_3 (see Skips) are on the
        device."""
        names = [name for name in terms if name != REPLACED]
        values = torch.stack([*(terms[name] for name in names), terms["loss"].new_ones(())]).double()
        taken = torch.where(skips_3[1] == 0, values, 0.0)  # a skipped step's terms need not be numbers
        taken = torch.cat([taken, terms[REPLACED].double()[None]])
        self._sums = taken if self._sums is None else self._sums + taken
        self._names, self._skips_3 = names, skips_3
        self._steps += 1
        if step % self._every == 0:
            self._ask(step, epoch, lr)
        while self._pending and self._pending[0].values.arrived():
            self._hand_on()
        self._look_at_skips(step)

    def _look_at_skips(self, step: int) -> None:
        """Keep `skips` up to date, however seldom entries are written."""
        if step % MAX_SKIPPED == 0 and not self._look:
            self._look = _Arriving(self._skips_3)
        if self._look and self._look.arrived():
            self.skips, self._look = _skips(self._look.read()), None

    def flush(self, step: int, epoch: int, lr: float) -> None:
        """Wait for what was summed since the last time and hand it on; `skips` is then that of this step."""
        if self._steps:
            self._ask(step, epoch, lr)
        while self._pending:
            self._hand_on()

    def event(self, step: int, epoch: int, seconds: float, **figures: float | list[int]) -> None:
        """Hand on figures that are not a step's; the seconds they took are no training time.

        All entries until then are on the disk when it returns: those on their way are waited for.
        """
        self._began += seconds
        while self._pending:
            self._hand_on()
        for sink in self._sinks:
            sink.event({"step": step, "epoch": epoch, **figures})

    def close(self) -> None:
        """Close the sinks. What was not flushed is not handed on."""
        for sink in self._sinks:
            sink.close()

    def _ask(self, step: int, epoch: int, lr: float) -> None:
        """Start the way of the sums to the host."""
        if len(self._pending) == ON_THEIR_WAY:
            self._hand_on()
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        assert self._sums is not None
        figures = {
            "lr": lr,
            "images_per_sec": self._steps * self._batch_size / seconds,
            **self._health.memory(),
        }
        values = torch.cat([self._sums, self._skips_3.double()])
        place = {"step": step, "epoch": epoch}
        pending = _Pending(_Arriving(values), place, self._names, figures, self._clock.take(), seconds)
        self._pending.append(pending)
        self._sums, self._steps, self._began = None, 0, now

    def _hand_on(self) -> None:
        """Hand on the oldest entry whose values are on their way, once they are here."""
        pending = self._pending.popleft()
        *sums, count, replaced, total, in_a_row, last = pending.values.read()
        self.skips = _skips([total, in_a_row, last])
        means = {name: value / count if count else None for name, value in zip(pending.names, sums, strict=True)}
        counts = {REPLACED: round(replaced), "skipped": self.skips.total}
        entry = {**pending.place, **means, **pending.figures, **pending.shares(), **counts}
        for sink in self._sinks:
            sink.write(entry)


def _skips(values: list[float]) -> Skips:
    return Skips(*map(int, values))


class _Arriving:
    """Values on their way from the device."""

    def __init__(self, values: Tensor) -> None:
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event is None:
            self._host = values
        else:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event.record()

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        """The values; waits for those that are not here yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class _Pending(NamedTuple):
    """An entry that will be handed on once its values are here."""

    values: _Arriving
    place: dict
    names: list[str]
    figures: dict
    marks: Marks  # of its steps, which took so many seconds
    seconds: float

    def shares(self) -> dict[str, float]:
        """Of the time, once read: data_wait for batches, transfer_wait, a part of it, for their copy, views_time."""
        names = ("data_wait", "transfer_wait", "views_time")
        return {name: s / self.seconds for name, s in zip(names, seconds_of(self.marks), strict=True)}


class MetricsFile:
    """metrics.jsonl. Each entry is in the file at once, and on the disk after the next event."""

    def __init__(self, path: pathlib.Path, step: int) -> None:
        """step: the one the run goes on from; what an earlier attempt wrote of later ones is removed."""
        entries, damaged = read_lines(path)
        if damaged:
            print(f"warning: {path}: {damaged} damaged line(s) left out", file=sys.stderr, flush=True)
        self.reached = max((entry["step"] for entry in entries), default=0)  # by earlier attempts
        kept = [entry for entry in entries if entry["step"] <= step]
        replace_file(path, lambda file: file.write(b"".join(map(_line, kept))))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close(); holds nothing back to fail then

    def write(self, entry: Entry) -> None:
        """Raises OSError, on a full disk for example; what of the line is in the file then is no entry."""
        line = _line(entry)
        with naming(self._path):
            while line := line[self._file.write(line) :]:
                continue

    def event(self, entry: Entry) -> None:
        self.write(entry)
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(entry: Entry) -> bytes:
    known = {name: None if type(v) is float and not math.isfinite(v) else v for name, v in entry.items()}
    return f"{json.dumps(known, allow_nan=False)}\n".encode()


def read_metrics(path: pathlib.Path) -> list[Entry]:
    """The sound entries of a metrics.jsonl; none where there is no file. Raises OSError."""
    return read_lines(path)[0]


def read_lines(path: pathlib.Path) -> tuple[list[Entry], int]:
    """The sound entries of a metrics.jsonl, and how many other lines there are. Raises OSError.

    The begin of an entry at the end does not count: it is being written, or a crash has cut it, and what follows the
    checkpoint is done again.
    """
    entries, damaged = [], 0
    with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
        for line in _lines(file):
            if entry := _entry(line):
                entries.append(entry)
            else:
                damaged += line.endswith(b"\n") or not line.startswith(b"{")
    return entries, damaged


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; in place of one that is longer than any entry, one that is none."""
    while line := file.readline(LINE_BYTES):
        while not line.endswith(b"\n") and (rest := file.readline(LINE_BYTES)):
            line = b"?" + rest[-1:]
        yield line


def _entry(line: bytes) -> Entry | None:
    """The entry that a line holds, if it is a sound one."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if type(entry) is not dict or type(entry.get("step")) is not int or len(entry) > MOST_FIGURES:
        return None
    return entry if entry["step"] >= 0 and all(_is_sound(*figure) for figure in entry.items()) else None


def _is_sound(name: str, value: object) -> bool:
    """A figure is a number, or a histogram; a loss term and what an event measured may also be none, or not finite."""
    if name.startswith(HISTOGRAM):
        counts = value if type(value) is list and len(value) <= MOST_BINS else [None]
        return all(type(count) is int and 0 <= count <= LARGEST for count in counts)
    if name in FIGURES or name.startswith("knn_"):
        return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[operator, arg-type]
    return value is None or type(value) is float or (type(value) is int and abs(value) <= LARGEST)
