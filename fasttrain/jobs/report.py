"""Write a run's report, a page of its own, or one that compares several runs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from fasttrain.jobs.options import ReportConfig
from fasttrain.page.comparison import write_comparison
from fasttrain.page.headlines import newest_of_each
from fasttrain.page.history import History
from fasttrain.page.run_page import write_run_page
from fasttrain.system.errors import UserError


def write_report(run: pathlib.Path) -> dict:
    """Write run/report.html from what the run folder holds; returns the run's figures in one flat object.

    Raises UserError when it is no run.
    """
    history = History.read(run)
    return {**_figures(history), "report": str(write_run_page(history))}


def _figures(history: History) -> dict[str, Any]:
    """The newest accuracies, the settings of their protocols, with the step of those that are not of the last step that
    was evaluated, that step, and the rate of training."""
    newest = newest_of_each(history.evaluations)
    last = max((each.step for each in newest), default=0)
    figures: dict[str, Any] = {"step": last} if newest else {}
    for each in reversed(newest):  # of one name the first counts: of trained weights, of the encoder
        figures |= each.figures()
    protocols = {
        each.name: each.settings | ({"step": each.step} if each.step != last else {}) for each in reversed(newest)
    }
    return {**figures, "protocol": protocols, "images_per_sec": round(history.throughput, 1)}


def compare(runs: Sequence[pathlib.Path], out: pathlib.Path) -> dict:
    """Write a page that compares runs; returns the figures of each by its path. Raises UserError where one is none."""
    histories = [History.read(run) for run in runs]
    write_comparison(histories, out)
    return {"runs": {str(history.run): _figures(history) for history in histories}, "report": str(out)}


def report(options: ReportConfig) -> int:
    runs = list(dict.fromkeys(map(pathlib.Path, options.run)))
    if len(runs) > 1:
        out = pathlib.Path(options.out) if options.out else runs[0].resolve().parent / "comparison.html"
        print(json.dumps(compare(runs, out)))
    elif runs and not options.out:
        print(json.dumps(write_report(runs[0])))
    else:
        raise UserError("--out is for a page that compares several runs" if runs else "which run? none was given")
    return 0
