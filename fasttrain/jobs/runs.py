"""List the runs under a folder: find them, sum each up, sort, and show a table or JSON."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasttrain.jobs.options import RunsConfig
from fasttrain.run.ending import TIME
from fasttrain.run.summary import MARKS, Accuracy, Summary, summary
from fasttrain.system.cli import warn
from fasttrain.system.errors import UserError, printable

MOST_DEEP, MOST_FOLDERS = 10, 100_000  # what is searched: a folder of images may lie beside the runs
WIDE = 120  # characters from which all columns are shown
NARROW = "run", "method", "step", "kNN", "linear", "images/s", "state", "when"  # those that are shown below that
UNTOLD = 200  # width where nobody looks
NAMED = 3  # runs of which one line is told
STYLES = {"running": "green", "done": "", "stopped": "yellow", "killed": "yellow", "failed": "red", "damaged": "red"}
TOLD = "failed", "damaged", "unknown"  # states whose line is told below the table

# How each column is sorted: a name, or a number of which the highest comes first.
KEYS: dict[str, Callable[[Summary], str | float | None]] = {
    "when": lambda run: run.when or None,
    "run": lambda run: str(run.path),
    "method": lambda run: run.method,
    "arch": lambda run: run.arch,
    "data": lambda run: run.data,
    "step": lambda run: run.step,
    "epochs": lambda run: run.epochs,
    "knn": lambda run: None if run.knn is None else run.knn.top1,
    "linear": lambda run: None if run.linear is None else run.linear.top1,
    "loss": lambda run: None if run.loss is None else -run.loss,
    "images_per_sec": lambda run: run.images_per_sec,
    "state": lambda run: run.ended.state,
}


def run_folders(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The run folders in a folder, or itself, in no order; what lies inside of one is not searched.

    Links and hidden folders are passed over, and what can't be read, or lies too deep, with a warning.
    """
    waiting, seen = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop()
        seen += 1
        if seen > MOST_FOLDERS:
            warn(f"more than {MOST_FOLDERS:,} folders: {len(waiting) + 1} and what is in them were not searched")
            return
        if depth > MOST_DEEP:
            warn(f"{here} lies too deep: it was not searched")
            continue
        try:
            with os.scandir(here) as found:
                entries = [entry for entry in found if entry.is_dir(follow_symlinks=False) or entry.name in MARKS]
        except OSError as error:
            warn(f"{here} is left out: {error.strerror}")
            continue
        if sum(entry.name in MARKS for entry in entries) > 1:
            yield here
            continue
        inner = (entry for entry in entries if entry.name not in MARKS and not entry.name.startswith("."))
        waiting += [(here / entry.name, depth + 1) for entry in inner]


def in_order(summaries: list[Summary], column: str) -> list[Summary]:
    """Sorted by a column of KEYS, those without a value last, equal ones by their paths."""
    of, by_path = KEYS[column], sorted(summaries, key=lambda run: run.path)
    known = [run for run in by_path if of(run) not in (None, "")]
    numbers = not any(isinstance(of(run), str) for run in known)
    known.sort(key=lambda run: -of(run) if numbers else of(run))  # type: ignore[operator, arg-type, return-value]
    return [*known, *(run for run in by_path if of(run) in (None, ""))]


def as_json(run: Summary) -> dict[str, Any]:
    """A run's line of the table and more, flat."""
    figures: dict[str, Any] = {
        "run": str(run.path), "method": run.method, "arch": run.arch, "data": run.data, "preset": run.preset,
        "step": run.step, "last_step": run.last_step, "epochs": run.epochs and round(run.epochs, 3),
    }  # fmt: skip
    for name, accuracy in (("knn", run.knn), ("linear", run.linear)):
        figures |= {f"{name}_{field}": getattr(accuracy, field, None) for field in ("top1", "step", "source")}
    protocol = {name: each.settings for name, each in (("knn", run.knn), ("linear", run.linear)) if each}
    return {
        **figures, "protocol": protocol, "loss": run.loss,
        "images_per_sec": run.images_per_sec and round(run.images_per_sec, 1),
        "state": run.ended.state, "line": run.ended.line,
        "when": time.strftime(TIME, time.localtime(run.when)) if run.when else None,
    }  # fmt: skip


def table(summaries: list[Summary], folder: pathlib.Path, is_wide: bool) -> Table:
    """The runs, one a row; where there is little room only the columns that tell most."""
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    rows = [_cells(run, folder) for run in summaries]
    for name in rows[0]:
        if is_wide or name in NARROW:
            is_name = name in ("run", "method", "arch", "data", "state")
            drawn.add_column(name, justify="left" if is_name else "right", overflow="fold", no_wrap=name != "run")
    shown = [str(column.header) for column in drawn.columns]
    for run, cells in zip(summaries, rows, strict=True):
        state = Text(cells["state"], STYLES.get(run.ended.state, ""))
        drawn.add_row(*(state if name == "state" else Text(cells[name]) for name in shown))
    return drawn


def _cells(run: Summary, folder: pathlib.Path) -> dict[str, str]:
    name = os.path.relpath(run.path, folder)
    of = f"/{run.last_step:,}" if run.last_step is not None else ""
    return {
        "run": printable(run.path.name if name == "." else name),
        **{field: printable(getattr(run, field)) or "–" for field in ("method", "arch", "data")},
        "step": "–" if run.step is None else f"{run.step:,}{of}",
        "epochs": _rounded(run.epochs, 1), "kNN": _percent(run.knn, run), "linear": _percent(run.linear, run),
        "loss": _rounded(run.loss, 3), "images/s": _rounded(run.images_per_sec, 0), "state": run.ended.state,
        "when": _age(time.time() - run.when) if run.when else "–",
    }  # fmt: skip


def _rounded(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(accuracy: Accuracy | None, run: Summary) -> str:
    """With marks: * measured while training, ← of weights before the run's last step."""
    if accuracy is None:
        return "–"
    before = "←" if run.step is not None and accuracy.step < run.step else ""
    return f"{accuracy.top1:.1f}{'*' if accuracy.source == 'training' else ''}{before}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _notes(summaries: list[Summary], folder: pathlib.Path) -> Iterator[str]:
    """What the table's marks mean, where it has them, and the lines of runs that ended badly."""
    accuracies = [(run, each) for run in summaries for each in (run.knn, run.linear) if each]
    if any(each.source == "training" for _, each in accuracies):
        yield "* measured while training (--knn-every), and nothing newer by evaluate.py"
    if any("←" in _percent(each, run) for run, each in accuracies):
        yield "← of weights from before the run's last step: evaluate it again"
    lines: dict[tuple[str, str], list[str]] = {}
    for run in summaries:
        if run.ended.state in TOLD:
            lines.setdefault((run.ended.state, run.ended.line), []).append(_cells(run, folder)["run"])
    for (state, line), names in lines.items():
        others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{state}: {', '.join(names[:NAMED])}{others}: {printable(line)}"


def runs(options: RunsConfig) -> int:
    folder = pathlib.Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one that holds the runs")
    summaries = in_order([summary(run) for run in run_folders(folder)], options.sort)
    if options.json:
        print(json.dumps({"runs": [as_json(run) for run in summaries]}))
        return 0
    if not summaries:
        print(f"no runs in {printable(folder)}")
        return 0
    sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(file=sys.stdout, width=None if sized else UNTOLD, highlight=False)
    console.print(table(summaries, folder, console.width >= WIDE))
    for note in _notes(summaries, folder):
        console.print(Text(note))
    return 0
