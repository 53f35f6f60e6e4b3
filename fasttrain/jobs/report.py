"""Write a run's report, a page of its own, or one that compares several runs."""

from __future__ import annotations

import json
import pathlib

from fasttrain.jobs.options import ReportConfig
from fasttrain.page.headlines import newest_of_each
from fasttrain.page.history import History
from fasttrain.page.run_page import write_run_page


def write_report(run: pathlib.Path) -> dict:
    """Write run/report.html from what the run folder holds; returns the run's figures in one flat object.

    Raises UserError when it is no run.
    """
    history = History.read(run)
    return {**_figures(history), "report": str(write_run_page(history))}


def _figures(history: History) -> dict[str, float]:
    """The newest accuracies, the last step that was evaluated, and the rate of training."""
    newest = newest_of_each(history.evaluations)
    figures: dict[str, float] = {"step": max(each.step for each in newest)} if newest else {}
    for each in newest:
        figures |= each.figures()
    return {**figures, "images_per_sec": round(history.throughput, 1)}


def report(options: ReportConfig) -> int:
    print(json.dumps(write_report(pathlib.Path(options.run))))
    return 0
