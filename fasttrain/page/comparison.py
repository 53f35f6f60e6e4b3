"""One page that compares runs: what differs in their settings and figures, and their curves over one another."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from urllib.parse import quote

import numpy as np

from fasttrain.page.charts import Line, curves
from fasttrain.page.comparison_table import by_protocol, differences
from fasttrain.page.curves import same
from fasttrain.page.headlines import asked_of, newest_of_each
from fasttrain.page.history import History
from fasttrain.page.shell import charts, figure, key, section, text, write_page
from fasttrain.page.style import SERIES, SOFT
from fasttrain.run.metrics import FIGURES
from fasttrain.system.errors import UserError

KIND = "comparison"
MOST_CHARTS = 30
OBJECTIVE = "method", "temperature", "queue_size"  # losses can be compared only where these are the same
SHARES = {"contrastive_accuracy": "Contrastive accuracy, %", "queue_filled": "Queue filled, %"}
NOTE = (
    "Green: the highest of figures that were measured alike. Below an accuracy is its interval at 95 %, over images: "
    "where one holds the other's figure, these images hardly tell the runs apart, and seeds differ besides. A step "
    "stands there where it is not the run's last."
)


def write_comparison(histories: Sequence[History], path: pathlib.Path) -> None:
    """Write the page. Raises UserError rather than write over anything but an earlier comparison."""
    _check_free(path)
    colours = _colours(histories)
    title = f"{len(histories)} runs compared"
    parts = (
        f"<h1>{title}</h1>", _legend(histories, colours, path), *_warnings(histories),
        section("What differs", differences(histories), note=NOTE),
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
    for name, found in by_protocol(histories).items():
        there = [each for each in found if each]
        if len({each.fingerprint or each.data for each in there}) > 1:
            said.append(f"{name} was measured on different images.")
        if len({asked_of(each) for each in there}) > 1:
            said.append(f"{name} was measured with different settings.")
        if any(each and each.step != of.step for each, of in zip(found, histories, strict=True)):
            said.append(f"{name} was measured before or after the last step that was logged.")
    if len({history.step for history in histories}) > 1:
        said.append("The runs have not done the same number of steps.")
    return [f"<p class=advice>{text(' '.join(said))}</p>"] if said else []


def _over_epochs(histories: Sequence[History]) -> bool:
    """Are curves over epochs? Of the same images they are the fairer measure where batches differ."""
    alike = len({history.fingerprint for history in histories}) == 1
    return alike and all(history.scale().epoch(history.step) > 2 for history in histories)


def _note(histories: Sequence[History]) -> str:
    over = "Over epochs." if _over_epochs(histories) else "Over steps."
    gray = f" In colours: the {len(SERIES)} most accurate runs." if len(histories) > len(SERIES) else ""
    objectives = {tuple(str(history.config.get(name)) for name in OBJECTIVE) for history in histories}
    losses = (
        " The losses here differ in what they sum up: no lower one is better for it." if len(objectives) > 1 else ""
    )
    return f"{over} Means over a 25th of each run. At a curve's end: its run's number, and the value.{losses}{gray}"


def _curves(histories: Sequence[History], colours: Sequence[str]) -> list[str]:
    """A chart of each figure that two runs or more have, but for one that shows what another one does."""
    last = [history.entries[-1] for history in histories if history.entries]
    terms = list(dict.fromkeys(name for entry in last for name in entry if name not in FIGURES))
    of_events = {
        "knn_top1": "kNN top-1 while training, %", "subset_knn_top1": "Subset kNN top-1 while training, %",
        "probe_top1": "Probe top-1 while training, %", "rankme": "RankMe",
        "feature_std": "Standard deviation of the features", "std": "Standard deviation of the projections",
        "alignment": "Alignment", "uniformity": "Uniformity", "alpha_req": "α-ReQ", "lidar": "LiDAR rank",
        "compactness": "Compactness",
    }  # fmt: skip
    of_entries = {name: name.replace("_", " ").capitalize() for name in terms} | SHARES
    of_entries |= {"images_per_sec": "Images per second", "lr": "Learning rate"}
    figures, seen = [], list[list[Line]]()
    for name, title in [*of_events.items(), *of_entries.items()][:MOST_CHARTS]:
        lines = _lines(histories, colours, name, name in of_events)
        if len(lines) < 2 or any(_alike(lines, others) for others in seen):
            continue
        seen.append(lines)
        alt = f"{title} of {len(lines)} runs over {'epochs' if _over_epochs(histories) else 'steps'}"
        in_front = sorted(lines, key=lambda line: line.named)  # those in colours over the others
        figures.append(figure(title, curves(in_front, alt)))
    return figures


def _lines(histories: Sequence[History], colours: Sequence[str], name: str, events: bool) -> list[Line]:
    """The curve of each run that has a figure."""
    epochs, lines = _over_epochs(histories), []
    for number, (history, colour) in enumerate(zip(histories, colours, strict=True), 1):
        steps, values = history.column(name, 100.0 if name in SHARES else 1.0, events)
        x_N = list(map(history.scale().epoch, steps)) if epochs else steps
        if steps:
            lines.append(Line(str(number), x_N, values, colour, not events, len(steps) < 4, colour != SOFT, True))
    return lines


def _alike(lines: Sequence[Line], others: Sequence[Line]) -> bool:
    pairs = zip(lines, others, strict=False)
    return len(lines) == len(others) and all(same(np.asarray(a.y_N), np.asarray(b.y_N)) for a, b in pairs)
