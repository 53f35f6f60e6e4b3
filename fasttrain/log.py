"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard, and the picture of augmented pairs."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fasttrain.cli import RunError, UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Item = TypeVar("Item")
PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class TrainLog:
    """Collects a run's figures without waiting for the device, and reads them every `every` steps.

    A step's terms stay on the device until they are read; the data wait is measured where batches are taken.
    """

    def __init__(
        self, run: pathlib.Path, step: int, total_steps: int, every: int, batch_size: int, tensorboard: bool
    ) -> None:
        """step: the step the run starts from; later lines of an earlier attempt are removed from metrics.jsonl."""
        _keep_until(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in close()
        self._every, self._batch_size, self._total = every, batch_size, total_steps
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._began = self._printed = time.monotonic()
        self._writer = _tensorboard(run) if tensorboard else None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("step", total=total_steps, completed=step)
            self._bar.start()

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass batches on, counting the time spent waiting for each."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield item

    def step(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor]) -> None:
        """Count a finished step (1 for the first). Raises RunError when a loss read now is not finite."""
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term.clone()
        self._steps += 1
        if self._bar:
            self._bar.update(self._task, completed=step)
        if step % self._every == 0 or step == self._total:
            self.flush(step, epoch, lr)

    def flush(self, step: int, epoch: int, lr: float) -> None:
        """Read the terms summed since the last time and write them everywhere."""
        if not self._steps:
            return
        values = torch.stack([term.float() for term in self._sums.values()]).tolist()  # the one wait for the device
        means = {name: value / self._steps for name, value in zip(self._sums, values, strict=True)}
        now = time.monotonic()
        seconds = now - self._began
        entry = {
            "step": step, "epoch": epoch, **means, "lr": lr,
            "images_per_sec": self._steps * self._batch_size / seconds, "data_wait": self._waited / seconds,
        }  # fmt: skip
        self._sums, self._steps, self._waited, self._began = {}, 0, 0.0, now
        self._file.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if self._writer and name != "step":
                self._writer.add_scalar(name, value, step)
        self._show(entry, means, now)
        if not all(math.isfinite(value) for value in means.values()):
            raise RunError(f"the loss is not finite at step {step} ({means}); lower --lr, or try --precision fp32")

    def _show(self, entry: dict, means: dict[str, float], now: float) -> None:
        terms = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        rates = f"{entry['images_per_sec']:.0f} images/s, {100 * entry['data_wait']:.0f}% waiting for data"
        text = f"epoch {entry['epoch']} {terms} lr {entry['lr']:.4f} {rates}"
        if self._bar:
            self._bar.update(self._task, description=text)
        elif now - self._printed > PLAIN_SECONDS or entry["step"] == self._total:
            self._printed = now
            left = (self._total - entry["step"]) * self._batch_size / entry["images_per_sec"]
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            print(f"step {entry['step']}/{self._total} {text}, {clock} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        if self._writer:
            self._writer.close()
        self._file.close()


class SilentLog(TrainLog):
    """What every rank but the first uses: passes batches on and tells nothing."""

    def __init__(self) -> None:
        self._waited = 0.0

    def step(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor]) -> None:
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
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def _tensorboard(run: pathlib.Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(str(run / "tensorboard"))
