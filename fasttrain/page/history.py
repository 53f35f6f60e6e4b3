"""Everything that a run's page tells of it, read once: settings, entries, accuracies, how it was started and ended."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttrain.page.charts import Scale
from fasttrain.run.ending import Ending, ending_of
from fasttrain.run.evaluations import Evaluation, read_evaluations
from fasttrain.run.folder import config_of, read_record
from fasttrain.run.metrics import LARGEST, Entry, read_lines
from fasttrain.run.starts import starts_of
from fasttrain.system.cli import warn
from fasttrain.system.errors import UserError
from fasttrain.views.options import ViewOptions

MOST_MARKS = 40


@dataclass(frozen=True)
class History:
    """entries: of training, events: all others, both of metrics.jsonl, which has so many damaged lines."""

    run: pathlib.Path
    record: dict[str, Any]
    entries: list[Entry]
    events: list[Entry]
    damaged: int
    evaluations: list[Evaluation]
    ending: Ending

    @classmethod
    def read(cls, run: pathlib.Path) -> History:
        """Raises UserError when it is no run, or has no settings."""
        record = read_record(config_of(run))
        entries, damaged = read_lines(run / "metrics.jsonl")
        if damaged:
            warn(f"{run / 'metrics.jsonl'}: {damaged} damaged line(s) left out of the report")
        of_training = [entry for entry in entries if "images_per_sec" in entry]
        others = [entry for entry in entries if "images_per_sec" not in entry]
        return cls(run, record, of_training, others, damaged, read_evaluations(run), ending_of(run, record))

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def environment(self) -> dict[str, Any]:
        found = self.record.get("environment")
        return found if isinstance(found, dict) else {}

    @property
    def starts(self) -> list[dict[str, Any]]:
        return starts_of(self.record)

    @property
    def shuffle(self) -> str:
        """The order of the images that the newest start took, whatever --shuffle says; "" where it is not recorded."""
        found = self.starts[-1].get("shuffle") if self.starts else None
        return found if isinstance(found, str) else ""

    @property
    def fingerprint(self) -> str:
        """Of the images trained on, "" where it is not recorded."""
        data = self.record.get("data")
        found = data.get("fingerprint") if isinstance(data, dict) else None
        return found if isinstance(found, str) else ""

    @property
    def step(self) -> int:
        """The last one with an entry."""
        return self.entries[-1]["step"] if self.entries else 0

    def number(self, name: str) -> float:
        """An option's value, 0 for one that is no number."""
        return number(self.config.get(name))

    def column(self, name: str, scale: float = 1.0, events: bool = False) -> tuple[list[float], list[float]]:
        """The steps of the entries (or events) with a figure, and its values; not a number where it can't be drawn."""
        found = [entry for entry in (self.events if events else self.entries) if name in entry]
        return [entry["step"] for entry in found], [scale * drawable(entry[name]) for entry in found]

    @property
    def throughput(self) -> float:
        """Median images/s of the entries, the first left out (it includes start-up) when there are others."""
        rates = sorted(entry["images_per_sec"] for entry in self.entries[1:] or self.entries)
        return rates[len(rates) // 2] if rates else 0.0

    def scale(self) -> Scale:
        """Steps in epochs, as the entries' epochs tell, and in hours of training, as their images per second do."""
        per_epoch = self.steps_per_epoch()
        steps = np.array([0.0, *(float(entry["step"]) for entry in self.entries)])
        rates = np.array([entry["images_per_sec"] for entry in self.entries], float)
        took = np.maximum(np.diff(steps), 0) * self.number("batch_size") / np.maximum(rates, 1e-9)
        hours = np.concatenate([[0.0], np.cumsum(took)]) / 3600
        return Scale(lambda step: step / per_epoch, lambda step: float(np.interp(step, steps, hours)))

    def steps_per_epoch(self) -> float:
        """As config.json tells, or, for a run by an earlier version, the entries: step s is of epoch (s - 1) // n, and
        n the greatest whole number that all of them allow, 1 without any."""
        if told := self._steps("per_epoch"):
            return told
        least, most = 1.0, math.inf
        for entry in (*self.entries, *self.events):
            step, epoch = entry["step"], number(entry.get("epoch"))
            if step > 0 and epoch >= 0:
                least = max(least, (step - 1) / (epoch + 1))
                most = min(most, (step - 1) / epoch) if epoch else most
        whole = math.floor(most) if math.isfinite(most) else 0
        return max(1.0, whole if whole > least else least if math.isinf(most) else most)

    def _steps(self, name: str) -> float:
        """What config.json tells of the steps: last, per_epoch; 0 for nothing."""
        steps = self.record.get("steps")
        return max(0.0, number(steps.get(name))) if isinstance(steps, dict) else 0.0

    @property
    def epochs(self) -> float:
        """That the run was to take, those it was extended by included."""
        extend = self.config.get("extend")
        return self.number("epochs") + sum(map(number, extend if isinstance(extend, list) else []))

    def planned_steps(self) -> int:
        """0 where it is not known."""
        if told := self._steps("last"):
            return int(told)
        known = any(number(entry.get("epoch")) for entry in self.entries)
        whole = round(self.epochs * self.steps_per_epoch()) if known else 0
        return int(min(whole, self.number("max_steps") or whole))

    def marks(self) -> list[tuple[float, str]]:
        """Steps at which something happened that curves may show, and what."""
        found = [(start["step"], "resumed") for start in self.starts if start["step"] > 0]
        extended = self.record.get("extended")
        found += [(number(each.get("step")), "extended") for each in _dicts(extended)]
        found += self._sizes()
        inside = [(step, name) for step, name in found if 0 <= step <= self.step]
        return sorted(dict(inside).items())[:MOST_MARKS]

    def _sizes(self) -> list[tuple[float, str]]:
        """Where views of another size began."""
        marks: list[tuple[float, str]] = []
        shown, last = 0, self.step / self.steps_per_epoch()
        with contextlib.suppress(UserError, TypeError):
            options = ViewOptions(size=self.config.get("size", 0), resolution=self.config.get("resolution") or "")
            for epoch in range(int(min(last + 1, self.number("epochs"), 1e5)) if options.resolution else 0):
                if (size := options.size_at(epoch, int(self.number("epochs")))) != shown:
                    marks += [(epoch * self.steps_per_epoch(), f"{size} px")] if shown else []
                    shown = size
        return marks

    def skipped_steps(self) -> list[int]:
        """The steps of entries before which steps were skipped, as they were not finite."""
        pairs = zip([{"skipped": 0}, *self.entries], self.entries, strict=False)
        return [now["step"] for before, now in pairs if number(now.get("skipped")) > number(before.get("skipped"))]


def number(value: object) -> float:
    """A finite number that a file holds; 0 for anything else."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else 0.0  # type: ignore[arg-type, operator]


def drawable(value: object) -> float:
    """As it is drawn; not at all where every step of the entry was skipped, or the value is not finite."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else math.nan  # type: ignore[arg-type, operator]


def _dicts(found: object) -> Iterable[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
