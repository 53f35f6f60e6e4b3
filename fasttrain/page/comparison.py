"""One page that compares runs: what differs in their settings and figures, and their curves over one another."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from fasttrain.page.charts import Line, curves
from fasttrain.page.headlines import duration, newest_of_each, settings_of, top1_name
from fasttrain.page.history import History
from fasttrain.page.settings import PLACES, shown
from fasttrain.page.shell import charts, figure, key, section, table, text, write_page
from fasttrain.page.style import SERIES, SOFT
from fasttrain.run.earlier import named_now
from fasttrain.run.evaluations import Evaluation
from fasttrain.run.metrics import FIGURES
from fasttrain.system.errors import UserError

KIND = "comparison"
MOST_NAMED, MOST_COLUMNS, MOST_CHARTS = 6, 12, 24  # runs named in the head of the table, in columns; charts
RATE = "images per second"


class Row(NamedTuple):
    """Of the table: what, each run's, and the places of the best ones."""

    name: str
    cells: list[str]
    best: list[int]


def write_comparison(histories: Sequence[History], path: pathlib.Path) -> None:
    """Write the page. Raises UserError rather than write over anything but an earlier comparison."""
    _check_free(path)
    colours = _colours(histories)
    title = f"{len(histories)} runs compared"
    parts = (
        f"<h1>{title}</h1>", _legend(histories, colours, path), *_warnings(histories),
        section("What differs", _table(histories)),
        section("Curves", charts(_curves(histories, colours)), note=_note(histories)),
    )  # fmt: skip
    write_page(path, title, parts, KIND)


def _check_free(path: pathlib.Path) -> None:
    if os.path.lexists(path):
        start = path.read_bytes()[:1000] if path.is_file() else b""
        if f'content="fasttrain {KIND}"'.encode() not in start:
            raise UserError(f"{path} is there already and is no comparison of runs: choose another --out")


def _colours(histories: Sequence[History]) -> list[str]:
    """A colour for each run; of more runs than there are colours, for the most accurate ones, and gray for the rest."""

    def reached(place: int) -> tuple[float, float]:
        found = [each.top1 for each in newest_of_each(histories[place].evaluations) if not each.untrained]
        while_training = histories[place].column("knn_top1", events=True)[1]
        return (found or [0.0])[0], (while_training or [0.0])[-1]

    first = sorted(range(len(histories)), key=reached, reverse=len(histories) > len(SERIES))[: len(SERIES)]
    chosen = dict(zip(sorted(first), SERIES, strict=False))
    return [chosen.get(place, SOFT) for place in range(len(histories))]


def _legend(histories: Sequence[History], colours: Sequence[str], path: pathlib.Path) -> str:
    """Each run's number, colour and name, with its page behind it."""
    lines = []
    for number, (history, colour) in enumerate(zip(histories, colours, strict=True), 1):
        page = quote(os.fsencode(os.path.relpath(history.run / "report.html", path.parent)))
        named = " · ".join(str(history.config.get(name, "?")) for name in ("method", "arch"))
        lines.append(f'<li>{key(str(number), colour)}<a href="{page}">{text(history.name)}</a> {text(named)}</li>')
    return f"<ul class=runs>{''.join(lines)}</ul>"


def _warnings(histories: Sequence[History]) -> list[str]:
    """What keeps the figures from being compared."""
    said = []
    if len({history.fingerprint for history in histories}) > 1:
        said.append("The runs were trained on different images.")
    for name, found in _by_protocol(histories).items():
        there = [each for each in found if each]
        if len({each.fingerprint or each.data for each in there}) > 1:
            said.append(f"{name} was measured on different images.")
        if len({settings_of(each) for each in there}) > 1:
            said.append(f"{name} was measured with different settings.")
    if len({history.step for history in histories}) > 1:
        said.append("The runs have not done the same number of steps.")
    return [f"<p class=advice>{text(' '.join(said))}</p>"] if said else []


def _by_protocol(histories: Sequence[History]) -> dict[str, list[Evaluation | None]]:
    """By the name of a figure, each run's newest, None for one that was not measured."""
    found = [{top1_name(each): each for each in newest_of_each(history.evaluations)} for history in histories]
    names = dict.fromkeys(name for each in found for name in each if "untrained" not in name)
    return {name: [each.get(name) for each in found] for name in names}


def _table(histories: Sequence[History]) -> str:
    """Accuracies and rates of all, with the best ones marked, and what differs otherwise."""
    rows = [*_accuracies(histories), *_facts(histories), *_settings(histories)]
    few = len(histories) <= MOST_NAMED
    head = [f"{number} {history.name}" if few else str(number) for number, history in enumerate(histories, 1)]
    best = [(place, 1 + run) for place, row in enumerate(rows) for run in row.best]
    cells = [[row.name, *row.cells] for row in rows]
    return table(["", *head], cells, best, "many" if len(histories) > MOST_COLUMNS else "")


def _accuracies(histories: Sequence[History]) -> list[Row]:
    rows = []
    for name, found in _by_protocol(histories).items():
        there = [each for each in found if each]
        cells = ["–" if each is None else f"{each.top1:.1f}{_interval(each)}" for each in found]
        alike = len({(each.fingerprint or each.data, settings_of(each)) for each in there}) == 1
        values = [each.top1 if each else -1.0 for each in found]
        rows.append(Row(f"{name}, %", cells, _highest(values) if alike and len(there) > 1 else []))
    return rows


def _interval(each: Evaluation) -> str:
    return "" if each.low is None or each.high is None else f" ({each.low:.1f}–{each.high:.1f})"


def _highest(values: Sequence[float]) -> list[int]:
    return [place for place, value in enumerate(values) if value == max(values)] if len(set(values)) > 1 else []


def _facts(histories: Sequence[History]) -> list[Row]:
    """Rates and sizes; of other facts than rates, those that differ."""
    rates = [history.throughput for history in histories]
    rows = [Row(RATE, [f"{rate:,.0f}" for rate in rates], _highest(rates))]
    facts: dict[str, Callable[[History], str]] = {
        "steps": lambda history: f"{history.step:,}",
        "epochs done": lambda history: f"{history.scale().epoch(history.step):.3g}",
        "training time": lambda history: duration(history.scale().hours(history.step)),
        "state": lambda history: history.ending.get("state", "–"),
        "machine": lambda history: str(history.environment.get("machine", "–")),
        "processes": lambda history: str(history.starts[-1]["processes"]) if history.starts else "–",
        "fasttrain": lambda history: str(history.environment.get("fasttrain", "–")),
        "commit": lambda history: (history.starts[-1]["commit"] if history.starts else "") or "–",
        "images": lambda history: history.fingerprint[:8] or "–",
    }
    found = (Row(name, [fact(history) for history in histories], []) for name, fact in facts.items())
    return rows + [row for row in found if len(set(row.cells)) > 1]


def _settings(histories: Sequence[History]) -> list[Row]:
    configs: list[dict[str, Any]] = [named_now(history.config) for history in histories]
    names = dict.fromkeys(name for config in configs for name in config)
    kept = [name for name in names if name not in PLACES - {"method", "preset", "data"}]
    rows = [
        Row(f"--{name.replace('_', '-')}", [shown(config.get(name, "–")) for config in configs], []) for name in kept
    ]
    return [row for row in rows if len(set(row.cells)) > 1]


def _over_epochs(histories: Sequence[History]) -> bool:
    """Are curves over epochs? Of the same images they are the fairer measure where batches differ."""
    return len({history.fingerprint for history in histories}) == 1 and all(
        h.scale().epoch(h.step) > 2 for h in histories
    )


def _note(histories: Sequence[History]) -> str:
    over = "Over epochs." if _over_epochs(histories) else "Over steps."
    gray = f" In colours: the {len(SERIES)} most accurate runs." if len(histories) > len(SERIES) else ""
    return f"{over} Means over a 25th of each run; numbers at the ends are the runs'.{gray}"


def _curves(histories: Sequence[History], colours: Sequence[str]) -> list[str]:
    """A chart of each figure that two runs or more have."""
    names = [("knn_top1", "kNN top-1 while training, %", True), ("probe_top1", "Probe top-1 while training, %", True)]
    terms = dict.fromkeys(name for history in histories for entry in history.entries[-1:] for name in entry)
    named = {"contrastive_accuracy": "Contrastive accuracy"}
    names += [
        (name, named.get(name, name.replace("_", " ").capitalize()), False) for name in terms if name not in FIGURES
    ]
    names += [("rankme", "RankMe", True), ("std", "Standard deviation of a dimension", True)]
    names += [("images_per_sec", "Images per second", False), ("lr", "Learning rate", False)]
    epochs = _over_epochs(histories)
    figures = []
    for name, title, events in names[:MOST_CHARTS]:
        lines = []
        for number, (history, colour) in enumerate(zip(histories, colours, strict=True), 1):
            steps, values = history.column(name, events=events)
            x_N = [history.scale().epoch(step) for step in steps] if epochs else steps
            if steps:
                lines.append(Line(str(number), x_N, values, colour, not events, len(steps) < 4, colour != SOFT, True))
        if len(lines) > 1:
            lines.sort(key=lambda line: line.named)  # those in colours over the others
            alt = f"{title} of {len(lines)} runs over {'epochs' if epochs else 'steps'}"
            figures.append(figure(title, curves(lines, alt)))
    return figures
