"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fasttrain.engine.skips import MAX_SKIPPED, Skips
from fasttrain.input import Batch
from fasttrain.run.clock import BatchClock, Marks, seconds_of
from fasttrain.run.health import MEMORY, Health
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
ON_THEIR_WAY = 8  # entries at most; then the host waits for the oldest


class TrainLog:
    """Collects a run's figures without waiting for the device, and writes them every `every` steps.

    A step's terms stay on the device and are summed there. On a GPU the sums are copied to the host behind the steps
    that are under way, and written once they have arrived.
    """

    def __init__(
        self, run: pathlib.Path, step: int, total_steps: int, every: int, batch_size: int, tensorboard: bool,
        device: torch.device, workers: int,
    ) -> None:  # fmt: skip
        """step: the step the run starts from; later lines of an earlier attempt are removed from metrics.jsonl."""
        _keep_until(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in close()
        self._every, self._batch_size, self._total = every, batch_size, total_steps
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._skips_3 = torch.tensor(Skips())
        self._pending: collections.deque[_Pending] = collections.deque()
        self._look: _Arriving | None = None
        self._steps, self._replaced, self._clock = 0, 0, BatchClock(device)
        self._began = self._printed = time.monotonic()
        self._health = Health(device, workers)
        self.skips = Skips()  # as last read
        self._writer = _tensorboard(run) if tensorboard else None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("step", total=total_steps, completed=step)
            self._bar.start()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, counting the time that the steps wait for each, and samples that stand in for others."""
        for batch in self._clock.timed(batches):
            self._replaced += batch.replaced
            yield batch

    def making_views(self) -> contextlib.AbstractContextManager[None]:
        """Count the time of what is done in it to the views."""
        return self._clock.making_views()

    def step(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor], skips_3: Tensor) -> None:
        """Count a finished step (1 for the first). terms and skips_3 (see step.Skips) are on the device."""
        values = torch.stack([*terms.values(), terms["loss"].new_ones(())]).double()
        taken = torch.where(skips_3[1] == 0, values, 0.0)  # a skipped step's terms need not be numbers
        self._sums = taken if self._sums is None else self._sums + taken
        self._names, self._skips_3 = list(terms), skips_3
        self._steps += 1
        if self._bar:
            self._bar.update(self._task, completed=step)
        if step % self._every == 0 or step == self._total:
            self._ask(step, epoch, lr)
        while self._pending and self._pending[0].values.arrived():
            self._write()
        self._look_at_skips(step)

    def _look_at_skips(self, step: int) -> None:
        """Keep `skips` up to date, however seldom entries are written."""
        if step % MAX_SKIPPED == 0 and not self._look:
            self._look = _Arriving(self._skips_3)
        if self._look and self._look.arrived():
            self.skips, self._look = _skips(self._look.read()), None

    def flush(self, step: int, epoch: int, lr: float) -> None:
        """Read what was summed since the last time and write it everywhere; `skips` is then that of this step."""
        if self._steps:
            self._ask(step, epoch, lr)
        while self._pending:
            self._write()

    def event(self, step: int, epoch: int, seconds: float, **figures: float) -> None:
        """Write figures that are not a step's, a line of their own; the seconds they took are no training time.

        All lines until then are on the disk when it returns.
        """
        self._began += seconds
        self._record({"step": step, "epoch": epoch, **figures})
        os.fsync(self._file.fileno())
        self.say(", ".join(f"{name} {value:.2f}" for name, value in figures.items()) + f" at step {step}")

    def say(self, text: str) -> None:
        """One line on the terminal or in the log, above the progress bar if there is one."""
        if self._bar:
            self._console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _ask(self, step: int, epoch: int, lr: float) -> None:
        """Start the way of the sums to the host."""
        if len(self._pending) == ON_THEIR_WAY:
            self._write()
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        assert self._sums is not None
        figures = {
            "lr": lr,
            "images_per_sec": self._steps * self._batch_size / seconds,
            **self._health.memory(),
            "replaced": self._replaced,
        }
        values = torch.cat([self._sums, self._skips_3.double()])
        place = {"step": step, "epoch": epoch}
        pending = _Pending(_Arriving(values), place, self._names, figures, self._clock.take(), seconds)
        self._pending.append(pending)
        self._sums, self._steps, self._replaced, self._began = None, 0, 0, now

    def _write(self) -> None:
        """Write the oldest entry whose values are on their way, once they are here."""
        pending = self._pending.popleft()
        *sums, count, total, in_a_row, last = pending.values.read()
        self.skips = _skips([total, in_a_row, last])
        means = {name: value / count if count else None for name, value in zip(pending.names, sums, strict=True)}
        entry = {**pending.place, **means, **pending.figures, **pending.shares(), "skipped": self.skips.total}
        self._record(entry)
        self._show(entry, means)
        if hint := self._health.hint(entry):
            self.say(hint)

    def _record(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if self._writer and name != "step" and value is not None:
                self._writer.add_scalar(name, value, entry["step"])

    def _show(self, entry: dict, means: dict[str, float | None]) -> None:
        terms = " ".join(f"{name} {value:.4f}" for name, value in means.items() if value is not None)
        rates = f"{entry['images_per_sec']:.0f} images/s, {100 * entry['data_wait']:.0f}% waiting for data"
        faults = f", {entry['skipped']} steps skipped" if entry["skipped"] else ""
        faults += f", {entry['replaced']} images replaced" if entry["replaced"] else ""
        memory = ", ".join(f"{entry[name]:.1f} {text}" for name, text in MEMORY.items() if name in entry)
        text = f"epoch {entry['epoch']} {terms} lr {entry['lr']:.4g} {rates}, {memory}{faults}"
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, description=text)
        elif now - self._printed > PLAIN_SECONDS or entry["step"] == self._total:
            self._printed = now
            left = (self._total - entry["step"]) * self._batch_size / entry["images_per_sec"]
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            self.say(f"step {entry['step']}/{self._total} {text}, {clock} left")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._writer:
            self._writer.close()
        self._file.close()


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
    """An entry that will be written once its values are here."""

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


class SilentLog(TrainLog):
    """What every rank but the first uses: passes batches on and tells nothing."""

    def __init__(self) -> None:
        self.skips = Skips()

    def making_views(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return iter(batches)

    def step(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor], skips_3: Tensor) -> None:
        pass

    def flush(self, step: int, epoch: int, lr: float) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The entries of a metrics.jsonl; a line cut by a crash ends it."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _keep_until(path: pathlib.Path, step: int) -> None:
    """Remove what an earlier attempt wrote after the step the run goes on from."""
    kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
    replace_file(path, lambda file: file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode()))


def _tensorboard(run: pathlib.Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(str(run / "tensorboard"))
