"""The run whose representation is looked at while it lasts, as that sees it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from fasttrain.engine.probe import OnlineProbe
from fasttrain.engine.ranks import Ranks
from fasttrain.methods import Method
from fasttrain.run.display import Display
from fasttrain.run.metrics import Entry, Metrics, read_metrics


class Interrupted(Exception):
    """A signal came during a look."""


class Watched(NamedTuple):
    """run: its folder. mean, std: by which views are normalised. received: the signal that this process was sent, 0
    for none. first: the step that the run goes on from. last: its last step."""

    run: pathlib.Path
    method: Method
    probe: OnlineProbe | None
    mean: tuple
    std: tuple
    ranks: Ranks
    metrics: Metrics
    display: Display
    received: Callable[[], int]
    first: int
    last: int

    def of_first(self, look: Callable[[Callable[[], None]], int]) -> int:
        """What `look` returns on the first rank, or the signal that cut it short, on every rank; the others wait.

        It is given a function to call before each batch.
        """

        def work(still_here: Callable[[], None]) -> int:
            def each_batch() -> None:
                still_here()
                if self.received():
                    raise Interrupted

            try:
                return look(each_batch)
            except Interrupted:
                return self.received()

        return self.ranks.of_first(work)

    def entries(self) -> list[Entry]:
        """Of all attempts at this run."""
        return read_metrics(self.run / "metrics.jsonl")
