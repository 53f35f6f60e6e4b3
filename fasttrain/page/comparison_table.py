"""The table of a comparison: figures and facts of runs, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fasttrain.page.headlines import duration, highest, newest_of_each, top1_name
from fasttrain.page.history import History
from fasttrain.page.settings import PLACES, shown
from fasttrain.page.shell import Html, folded, table
from fasttrain.run.earlier import named_now
from fasttrain.run.evaluations import Evaluation
from fasttrain.system.options import flag

MOST_NAMED, MOST_COLUMNS = 6, 12  # runs named in the head of the table, in columns
RATE = "images per second"
ABSENT = "–"  # where a run's method has no such option


class Row(NamedTuple):
    """Of the table: what, each run's, and the places of the best ones."""

    name: str
    cells: list[str]
    best: list[int]


def by_protocol(histories: Sequence[History]) -> dict[str, list[Evaluation | None]]:
    """By the name of a figure, each run's newest, None for one that was not measured."""
    found = [{top1_name(each): each for each in newest_of_each(history.evaluations)} for history in histories]
    names = dict.fromkeys(name for each in found for name, of in each.items() if not of.untrained)
    return {name: [each.get(name) for each in found] for name in names}


def differences(histories: Sequence[History]) -> str:
    """Accuracies and rates of all, with the best ones marked, and what differs otherwise; options that only some of the
    methods have are folded."""
    settings = _settings(histories)
    shared = [row for row in settings if ABSENT not in row.cells]
    own = [row for row in settings if ABSENT in row.cells]
    rest = folded("options that only some of these methods have", _table(histories, own))
    return _table(histories, [*_accuracies(histories), *_facts(histories), *shared]) + rest


def _table(histories: Sequence[History], rows: Sequence[Row]) -> str:
    few = len(histories) <= MOST_NAMED
    head = [f"{number} {history.name}" if few else str(number) for number, history in enumerate(histories, 1)]
    best = [(place, 1 + run) for place, row in enumerate(rows) for run in row.best]
    cells = [[row.name, *row.cells] for row in rows]
    return table(["", *head], cells, best, "many" if len(histories) > MOST_COLUMNS else "")


def _accuracies(histories: Sequence[History]) -> list[Row]:
    rows = []
    for name, found in by_protocol(histories).items():
        cells = [
            "–" if each is None else Html(f"<span>{each.top1:.1f}</span>{_interval(each)}{_behind(each, history)}")
            for each, history in zip(found, histories, strict=True)
        ]
        rows.append(Row(f"{name}, %", cells, highest(found)))
    return rows


def _interval(each: Evaluation) -> str:
    return "" if each.low is None or each.high is None else f" <small>{each.low:.1f}–{each.high:.1f}</small>"


def _behind(each: Evaluation, history: History) -> str:
    """The step, where training has gone on since, or had not come as far."""
    return f" <small>step {each.step:,}</small>" if each.step != history.step else ""


def _facts(histories: Sequence[History]) -> list[Row]:
    """Rates and sizes; of other facts than rates, those that differ."""
    rates = [history.throughput for history in histories]
    alike = len(set(map(_conditions, histories))) == 1
    best = [place for place, rate in enumerate(rates) if rate == max(rates) > min(rates)] if alike else []
    rows = [Row(RATE, [f"{rate:,.0f}" for rate in rates], best)]
    facts: dict[str, Callable[[History], str]] = {
        "steps": lambda history: f"{history.step:,}",
        "epochs done": lambda history: f"{history.scale().epoch(history.step):.3g}",
        "training time": lambda history: duration(history.scale().hours(history.step)),
        "state": lambda history: history.ending.state,
        "machine": lambda history: str(history.environment.get("machine", "–")),
        "processes": _processes,
        "fasttrain": lambda history: str(history.environment.get("fasttrain", "–")),
        "commit": lambda history: (history.starts[-1]["commit"] if history.starts else "") or "–",
        "images": lambda history: history.fingerprint[:8] or "–",
        "shuffle of the images": lambda history: history.shuffle or "–",
    }
    found = (Row(name, [fact(history) for history in histories], []) for name, fact in facts.items())
    return rows + [row for row in found if len(set(row.cells)) > 1]


def _conditions(history: History) -> tuple[str, ...]:
    """Where these are the same, a higher rate is due to what was run."""
    return (
        str(history.environment.get("machine")),
        _processes(history),
        history.fingerprint,
        str(history.config.get("size")),
    )


def _processes(history: History) -> str:
    return str(history.starts[-1]["processes"]) if history.starts else "–"


def _settings(histories: Sequence[History]) -> list[Row]:
    configs: list[dict[str, Any]] = [named_now(history.config) for history in histories]
    names = dict.fromkeys(name for config in configs for name in config)
    kept = [name for name in names if name not in PLACES - {"method", "preset", "data"}]
    rows = [Row(flag(name), [shown(config.get(name, ABSENT)) for config in configs], []) for name in kept]
    return [row for row in rows if len(set(row.cells)) > 1]
