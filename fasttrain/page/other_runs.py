"""The other runs of the same images, in the folder that a run lies in."""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import Any
from urllib.parse import quote

from fasttrain.page.headlines import highest, newest_of_each
from fasttrain.page.history import History
from fasttrain.page.shell import Html, section, table, text
from fasttrain.run.evaluations import NAMES, Evaluation, read_evaluations
from fasttrain.run.folder import CONFIG, read_record
from fasttrain.system.errors import UserError

MOST_SEARCHED, MOST_BESIDE = 300, 6  # folders beside the run's, and runs in them that are shown


def beside(history: History) -> str:
    """The newest evaluated runs of the same images in the folder that the run lies in."""
    if not history.fingerprint:
        return ""
    runs = [(history.run, history.config, history.evaluations), *_others(history)]
    reached = [
        # of the projection only where there is none of the encoder, which comes first
        {each.protocol: each for each in reversed(newest_of_each(evaluations)) if not (each.untrained or each.variant)}
        for *_, evaluations in runs
    ]
    protocols = [name for name in NAMES if any(name in each for each in reached)]
    protocols += sorted({name for each in reached for name in each} - {*NAMES})
    if len(runs) == 1 or not protocols:
        return ""
    rows = []
    for (run, config, _), of in zip(runs, reached, strict=True):
        step = max((each.step for each in of.values()), default=None)
        words = [str(config.get(name, "?")) for name in ("method", "arch")]
        top1 = (f"{of[protocol].top1:.1f}" if protocol in of else "–" for protocol in protocols)
        rows.append([_linked(run, history.run), *words, "–" if step is None else f"{step:,}", *top1])
    best = [(row, 4 + place) for place, p in enumerate(protocols) for row in highest([of.get(p) for of in reached])]
    head = ("run", "method", "encoder", "step evaluated", *(f"{NAMES.get(p, p)} top-1, %" for p in protocols))
    note = "The newest runs in the same folder, trained on the same images. Green: the best of figures measured alike."
    return section("Other runs of the same images", table(head, rows, best), note=note)


def _linked(run: pathlib.Path, own: pathlib.Path) -> str:
    """A run's name, with its page behind it."""
    name = run.resolve().name
    if run == own:
        return Html(f"<b>{text(name)}, this run</b>")
    page = quote(os.fsencode(f"../{name}/report.html"))
    return Html(f'<a href="{page}">{text(name)}</a>') if (run / "report.html").exists() else name


def _others(history: History) -> list[tuple[pathlib.Path, dict[str, Any], list[Evaluation]]]:
    """The newest other runs beside this one that were evaluated, of the same images: folder, settings, accuracies."""
    found: list[tuple[pathlib.Path, dict[str, Any], list[Evaluation]]] = []
    own = history.run.resolve()
    with contextlib.suppress(OSError):
        configs = [path / CONFIG for path in own.parent.iterdir() if path != own]
        dated = sorted(((path.stat().st_mtime, path) for path in configs if path.is_file()), reverse=True)
        for _, path in dated[:MOST_SEARCHED]:
            with contextlib.suppress(UserError, OSError):
                record = read_record(path)
                data = record.get("data")
                alike = isinstance(data, dict) and data.get("fingerprint") == history.fingerprint
                if alike and (evaluations := read_evaluations(path.parent)):
                    found.append((path.parent, record["config"], evaluations))
            if len(found) == MOST_BESIDE:
                break
    return found
